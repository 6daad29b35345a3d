"""A frozen table under every strategy: losses of one process, checkpoints that go from one to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from rank_group import Groups
from stored_files import write_tensors
from tolerances import RANKS

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.tree import flatten

STEPS = 3
WEIGHT = "state_dict.model.tables.0.weight"


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("where", "overrides", "trip"),
    [
        ("file", "ffn=memory_plus table.shard=row", [("ddp", 2), ("single", 1)]),
        slow("drawn", "ffn=memory_plus table.shard=dim", [("ddp", 2), ("deepspeed_3", 2), ("fsdp", 2), ("single", 1)]),
        slow("drawn", "ffn=peer table.learning=dense table.shard=row", [("deepspeed_2", 2), ("fsdp", 4), ("ddp", 2)]),
        slow("file", "ffn=memory_plus table.learning=dense", [("fsdp", 2), ("deepspeed_1", 2), ("ddp", 4)]),
        slow("file", "ffn=memory_plus table.shard=dim", [("deepspeed_3", 2), ("single", 1), ("fsdp", 4)]),
        slow("mapped", "ffn=memory_plus", [("ddp", 2), ("fsdp", 2), ("deepspeed_3", 2), ("single", 1)]),
        slow("mapped", "ffn=engram ffn.end_id=0 ffn.rows=60", [("deepspeed_2", 2), ("ddp", 2), ("fsdp", 2)]),
    ],
)
def test_losses_are_those_of_one_process_and_checkpoints_travel(
    ranks: Groups, tmp_path: Path, where: str, overrides: str, trip: list[tuple[str, int]]
) -> None:
    given = [*overrides.split(), "table.trainable=false"]
    if where != "drawn":
        rows, dim = shape(given)
        path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(rows, dim).bfloat16()})
        given += [f"table.path={path}", *(["table.device=mmap"] if where == "mapped" else [])]
    last = tmp_path / "0.ckpt"
    expected = jobs.train(["strategy=single", *given], STEPS)
    jobs.train_and_save(["strategy=single", *given], STEPS, str(last))
    for number, (strategy, size) in enumerate(trip, start=1):
        losses = run(ranks, strategy, size, jobs.train, given, STEPS)
        for found, one_process in zip(losses, expected, strict=True):
            assert found["train/loss"] == pytest.approx(one_process["train/loss"], rel=RANKS["loss"])
        here = tmp_path / f"{number}.ckpt"
        run(ranks, strategy, size, jobs.resume_and_save, given, STEPS, str(last), str(here))
        _, before = flatten(SavedCheckpoint(last).read())
        _, after = flatten(SavedCheckpoint(here).read())
        assert before.keys() == after.keys()
        assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
        assert (WEIGHT in after) == (where == "drawn")
        last = here


def shape(given: list[str]) -> tuple[int, int]:
    """Returns rows and values per row of the model's table."""
    (table,) = build_meta_model(jobs.settings(*given)).tables
    return table.rows, table.dim  # type: ignore[return-value]


def run(ranks: Groups, strategy: str, size: int, job: Any, given: list[str], *arguments: Any) -> Any:
    named = [f"strategy={strategy}", *given]
    return job(named, *arguments) if size == 1 else ranks(size).run(job, named, *arguments)[0]
