"""The length of runs from budgets, and the short runs before the reported ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from pkm_lightning.compare.budget import steps_of_tokens, warm_up
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.schedule import ScheduledRun, Variant
from pkm_lightning.compare.time_left import TimeLeft
from pkm_lightning.data.base import yields_whole_steps
from pkm_lightning.errors import ConfigError


class Recorder(Processes):
    """Pool that starts nothing and records the runs."""

    def __init__(self) -> None:
        super().__init__(flags=[], logs=Path("logs"), jobs=1, ranks=1, resume="auto")
        self.runs: list[ScheduledRun] = []

    def run(self, planned: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]) -> Iterator[RunEnd]:  # type: ignore[override]
        self.runs += planned
        tick(list(planned))
        yield from ()


@pytest.mark.parametrize("callbacks", [{"recall": {"val_items": 64}}, {"diagnostics": {}}, None])
def test_a_variant_is_warmed_up_without_a_long_test(
    tmp_path: Path, callbacks: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    processes, config = Recorder(), {"trainer": {"accumulate_grad_batches": 1}, "callbacks": callbacks}
    variants = [Variant("a", ("ffn=dense", "trainer.max_steps=900"))]
    warm_up(variants, {"a": config}, ["data.people=60"], tmp_path, processes, TimeLeft(jobs=1))
    (run,) = processes.runs
    assert {"data.people=60", "ffn=dense", "trainer.max_steps=2", "++trainer.limit_test_batches=1"} <= set(
        run.overrides
    )
    assert "trainer.max_steps=900" not in run.overrides
    assert capsys.readouterr().out == "warm-up, which compiles kernels: 1 runs\na seed 0: started\n"
    assert ("~callbacks.recall" in run.overrides) is (callbacks is not None and "recall" in callbacks)


class Micro(LightningDataModule):
    """Data module with batches of 2 x 8 tokens, of which `real` are not padding."""

    def __init__(self, real: int) -> None:
        super().__init__()
        self.real = real

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        valid = torch.arange(16).view(2, 8) < self.real
        batch = {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "valid": valid}
        return DataLoader([batch] * 200, batch_size=None)


class Whole(Micro):
    """Data module whose batches are whole optimizer steps without a Trainer."""

    global_batch_size = 2


def config(**trainer: Any) -> dict[str, Any]:
    return {"trainer": {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, **trainer}}


def test_only_real_tokens_count() -> None:
    assert steps_of_tokens(1000, Micro(real=10), config(), whole_steps=False) == 100


def test_a_step_of_foreign_data_has_the_batches_of_all_ranks_and_micro_batches() -> None:
    spread = config(devices=2, num_nodes=2, accumulate_grad_batches=5)
    for data, steps in ((Micro(real=10), 5), (Whole(real=10), 100)):
        assert steps_of_tokens(1000, data, spread, whole_steps=yields_whole_steps(data)) == steps


@pytest.mark.parametrize(("budget", "real", "message"), [(3, 10, "less than a step"), (99, 0, "give no token")])
def test_a_budget_of_no_step_is_refused(budget: float, real: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        steps_of_tokens(budget, Micro(real), config(), whole_steps=False)
