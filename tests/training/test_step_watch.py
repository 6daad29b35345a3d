"""Watchers see each micro-batch once; of a refused step nothing stays, under every strategy."""

from __future__ import annotations

from typing import Any

import distributed_jobs as jobs
import lightning as L
import pytest
import torch
from rank_group import Groups
from torch import Tensor

STILL = ["optim.warmup_share=0", "optim.final_factor=1.0"]


class LogsDue(L.Callback):
    """Notes in which hooks of which micro-batch a log is due, and the step counter there."""

    def __init__(self) -> None:
        self.due: list[tuple[str, int, int]] = []

    def _note(self, hook: str, pl_module: Any, batch_idx: int) -> None:
        if pl_module.log_is_due():
            self.due.append((hook, batch_idx, pl_module.global_step))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._note("before", pl_module, trainer.fit_loop.epoch_loop.batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note("after", pl_module, batch_idx)


def test_a_log_is_due_before_and_after_the_update_of_the_step() -> None:
    noted = LogsDue()
    accumulate, every = "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=3"
    jobs.fit(jobs.settings("ffn=dense", accumulate, every, "strategy=single", steps=6), 6, watching=[noted])
    assert noted.due == [("before", 5, 2), ("after", 5, 3), ("before", 11, 5), ("after", 11, 6)]


class Watch(L.Callback):
    """Notes what is seen, and refuses the given steps."""

    def __init__(self, *refuse: int) -> None:
        self.refuse, self.seen, self.judged = refuse, [], []  # type: ignore[var-annotated]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.watch.watchers.append(lambda traces, batch: self.seen.append((traces, batch)))
        pl_module.watch.judges.append(self._judge)

    def _judge(self, figures: dict[str, Tensor]) -> bool:
        self.judged.append({name: float(value) for name, value in figures.items()})
        return len(self.judged) - 1 not in self.refuse


def test_every_micro_batch_is_seen_once() -> None:
    """Accumulates micro-batches, and recomputes activations in backward."""
    watch = Watch()
    settings = jobs.settings(
        "ffn=memory_plus", "model.activation_checkpointing=true", "trainer.accumulate_grad_batches=2",
        "strategy=single", steps=3,
    )  # fmt: skip
    jobs.fit(settings, 3, watching=[watch])
    assert len(watch.seen) == 3 * 2
    for traces, batch in watch.seen:
        for trace in traces.values():
            assert trace["slot_ids"].shape[:2] == batch["input_ids"].shape
            assert not trace["slot_weights"].requires_grad


def test_without_watchers_nothing_is_observed_and_without_judges_nothing_is_measured_in_vain() -> None:
    given = jobs.settings("ffn=memory_plus", "optim.clip_norm=null", "optim.table_clip_norm=null", steps=3)
    given["trainer"]["log_every_n_steps"] = 3
    figures: list[set[str]] = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            figures.append(set(pl_module.watch.figures))

    module = jobs.fit(given, 3, watching=[Look()])[0]
    assert not module.watch.observes
    assert all(not names for names in figures)


@pytest.mark.parametrize("learning", ["dense", "rows"])
def test_a_refused_step_leaves_no_trace_in_one_process(learning: str) -> None:
    _check_refusal(jobs.refuse, ["strategy=single", "ffn=memory_plus", f"table.learning={learning}"])


def test_a_refused_step_moves_no_running_statistics_and_no_bias() -> None:
    _check_refusal(jobs.refuse, ["strategy=single", "ffn=peer"])
    _check_refusal(jobs.refuse, ["strategy=single", "ffn=moe", "ffn.balancing=bias"])


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        pytest.param("ddp", "table.shard=dim", marks=pytest.mark.slow),
        ("fsdp", "table.shard=row"),
        pytest.param("deepspeed_1", "table.shard=dim", marks=pytest.mark.slow),
        pytest.param("deepspeed_2", "table.learning=dense trainer.accumulate_grad_batches=2", marks=pytest.mark.slow),
        pytest.param("deepspeed_3", "table.shard=dim trainer.accumulate_grad_batches=2", marks=pytest.mark.slow),
    ],
)
def test_a_refused_step_leaves_no_trace_on_ranks(ranks: Groups, strategy: str, more: str) -> None:
    for same in ranks(2).run(jobs.refuse, [f"strategy={strategy}", "ffn=memory_plus", *more.split(), *STILL]):
        assert same == []


def _check_refusal(job: Any, overrides: list[str]) -> None:
    assert job([*overrides, *STILL]) == []


def test_the_rate_of_a_refused_step_is_that_of_the_next() -> None:
    given = jobs.settings("ffn=dense", "optim.warmup_share=0", steps=4)
    seen = jobs.fit(given, 4, watching=[Watch(1)])[2]
    rates = [step["train/lr"] for step in seen]
    assert rates[1] == rates[2] > rates[3]


def test_figures_are_those_that_are_logged() -> None:
    watch = Watch()
    seen = jobs.fit(jobs.settings("ffn=memory_plus", steps=3), 3, watching=[watch])[2]
    for logged, judged in zip(seen, watch.judged, strict=True):
        assert {f"train/{name}": value for name, value in judged.items()} == {
            name: logged[name] for name in ("train/loss", "train/grad_norm_dense", "train/grad_norm_table")
        }
    assert torch.isfinite(torch.tensor([step["loss"] for step in watch.judged])).all()
