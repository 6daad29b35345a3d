"""Real facts at the smallest useful size, for tests that train: a few seconds a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


SMALL_DATA = [
    "data.people=60",
    "data.countries=10",
    "data.cities=20",
    "data.control_subjects=5",
    "data.eval_facts=20",
    "data.vocab_size=600",
    "data.global_batch_size=12",
]
SMALL_RUN = [
    *SMALL_DATA,
    "model.memory.n_keys=16",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=2",
    "callbacks.step_checkpoint.every_n_steps=4",
    "callbacks.recall.val_items=4",
    "callbacks.recall.test_items=8",
    "callbacks.samples.max_new_tokens=2",
    "~callbacks.progress_bar",
    "logger=none",
]
