"""A checkpoint goes from strategy to strategy and from size to size, and comes back bit-equal."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from rank_group import Groups
from tolerances import RANKS
from toys import config

from pkm_lightning.build.model import build_model
from pkm_lightning.checkpoints import SavedCheckpoint, later_buffers
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError

STEPS = 2


def content(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    skeleton, tensors = flatten(SavedCheckpoint(path).read())
    return skeleton, tensors


def step(ranks: Groups, strategy: str, size: int, job: Any, overrides: str, *arguments: Any) -> Any:
    named = [f"strategy={strategy}", *overrides.split()]
    if size == 1:
        return job(named, *arguments)
    return ranks(size).run(job, named, *arguments)[0]


def slow(*trip: Any) -> Any:
    return pytest.param(*trip, marks=pytest.mark.slow)


TRIPS = [
    ("ffn=memory_plus", [("ddp", 2), ("deepspeed_3", 2), ("single", 1), ("fsdp", 2)]),
    slow("ffn=memory_plus", [("fsdp", 4), ("deepspeed_1", 2), ("ddp", 2)]),
    slow("ffn=peer table.shard=row", [("fsdp", 2), ("single", 1), ("deepspeed_2", 2), ("fsdp", 4)]),
    slow("ffn=ultramem table.learning=dense", [("deepspeed_3", 2), ("ddp", 4), ("single", 1), ("fsdp", 2)]),
    slow("ffn=memory_plus table/optimizer=row_adagrad", [("ddp", 4), ("fsdp", 2), ("single", 1)]),
    slow("ffn=engram ffn.end_id=0 table.shard=row", [("ddp", 2), ("deepspeed_3", 2), ("fsdp", 4), ("single", 1)]),
    slow("ffn=memory_plus table/optimizer=factored_adam", [("ddp", 4), ("deepspeed_2", 2), ("single", 1), ("fsdp", 2)]),
    slow("ffn=peer table.shard=row table/optimizer=factored_adam", [("fsdp", 2), ("single", 1), ("ddp", 4)]),
    slow("ffn=peer table.optimizer.bias_correction=row", [("single", 1), ("fsdp", 4)]),
    slow("ffn=moe ffn.balancing=bias", [("fsdp", 2), ("deepspeed_3", 2), ("single", 1)]),
]


@pytest.mark.parametrize(("overrides", "trip"), TRIPS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_tensor_is_bit_equal_after_each_leg(
    ranks: Groups, tmp_path: Path, overrides: str, trip: list[tuple[str, int]]
) -> None:
    (strategy, size), *legs = trip
    last = tmp_path / "0.ckpt"
    step(ranks, strategy, size, jobs.train_and_save, overrides, STEPS, str(last))
    skeleton, tensors = content(last)
    assert any(name.startswith("optimizer_states.0.state") for name in tensors)
    for number, (strategy, size) in enumerate(legs, start=1):
        path = tmp_path / f"{number}.ckpt"
        step(ranks, strategy, size, jobs.resume_and_save, overrides, STEPS, str(last), str(path))
        again, found = content(path)
        assert tensors.keys() == found.keys()
        different = [name for name in tensors if not torch.equal(tensors[name], found[name])]
        assert not different, (strategy, size)
        assert again["optimizer_states"] == skeleton["optimizer_states"]
        assert again["lr_schedulers"] == skeleton["lr_schedulers"]
        last = path


@pytest.mark.slow
def test_a_run_that_changes_strategy_in_the_middle_reaches_the_same_losses(ranks: Groups, tmp_path: Path) -> None:
    half, end = str(tmp_path / "half.ckpt"), str(tmp_path / "end.ckpt")
    whole = step(ranks, "ddp", 2, jobs.train, "ffn=memory_plus", 6)
    first = step(ranks, "ddp", 2, jobs.train_half_and_save, "ffn=memory_plus", 3, 6, half)
    rest = step(ranks, "fsdp", 4, jobs.resume_and_save, "ffn=memory_plus", 6, half, end, 3)
    joined = [step["train/loss"] for step in (*first, *rest)]
    assert joined == pytest.approx([step["train/loss"] for step in whole], rel=RANKS["loss"])


@pytest.mark.slow
def test_a_truncated_or_missing_part_is_refused_in_one_sentence(ranks: Groups, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    step(ranks, "ddp", 2, jobs.train_and_save, "ffn=memory_plus", 1, str(path))
    part = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged \(.* is cut short\)"):
        SavedCheckpoint(path)
    part.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        SavedCheckpoint(path)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(ranks: Groups, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    messages = ranks(2).run(jobs.save_twice_on_a_full_disk, ["strategy=fsdp", "ffn=memory_plus"], str(path))
    for message in messages:
        assert "cannot be written" in message
        assert "previous checkpoint is whole" in message
    content(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("deepspeed_2", marks=pytest.mark.slow)])
def test_what_is_written_in_the_background_is_the_step_that_was_saved(
    ranks: Groups, tmp_path: Path, strategy: str
) -> None:
    here, there = tmp_path / "here.ckpt", tmp_path / "there.ckpt"
    overrides = [f"strategy={strategy}", "ffn=memory_plus"]
    ranks(2).run(jobs.save_in_the_background, overrides, str(here), str(there))
    (expected, tensors), (found, others) = content(here), content(there)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())
    assert expected["optimizer_states"] == found["optimizer_states"]


@pytest.mark.parametrize(
    ("lacks", "fits"), [("", True), (".pair", True), (".cores", False)], ids=["whole", "older", "incomplete"]
)
def test_a_checkpoint_may_lack_only_what_came_later(lacks: str, fits: bool, tmp_path: Path) -> None:
    """Checkpoints of version 0.1 have no `pair` of UltraMem's keys."""
    module = build_model(config("ffn=ultramem", "model.memory.n_keys=16"))
    state = {name: value for name, value in module.state_dict().items() if not (lacks and name.endswith(lacks))}
    torch.save({"state_dict": state}, tmp_path / "old")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    refused = pytest.raises(CheckpointError, match=r"old does not fit its configuration \(missing: .*cores")
    with contextlib.nullcontext() if fits else refused:
        SavedCheckpoint(tmp_path / "old").check_weights(expected, later_buffers(module))
