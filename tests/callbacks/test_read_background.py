"""ReadBackgroundCounter: counts of sequences against a recount, windows, ranks, resumes; nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import usage_jobs as jobs
from rank_group import Groups

from pkm_lightning.adaptation import ReadBackground
from pkm_lightning.callbacks import ReadBackgroundCounter
from pkm_lightning.errors import ConfigError

MEMORY = ["strategy=single", "ffn=memory_plus", "placement=all"]


def counter(**changes: Any) -> ReadBackgroundCounter:
    return ReadBackgroundCounter(**{"every_n_steps": 2, "sequences": 3, "window": 100, "max_slots": None, **changes})


def recount(raw: jobs.Raw, steps: list[int], sequences: int = 3) -> ReadBackground:
    """Counts the first sequences of the first micro-batch of each of `steps`, from copies of all traces."""
    batches, reads = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int64)
    first = {step: (traces, valid) for step, traces, valid in reversed(raw.seen)}
    for step in steps:
        traces, valid_BT = first[step]
        for b in range(sequences):
            read = torch.cat([t["slot_ids"][b][valid_BT[b]].flatten() for t in traces.values()])
            counts = read.bincount(minlength=256)
            batches += counts > 0
            reads += counts
    return ReadBackground(len(steps) * sequences, {"table0": batches}, {"table0": reads})


def assert_equal(state: dict[str, Any], expected: ReadBackground) -> None:
    background = ReadBackground.from_state(state["background"])
    assert background.n_batches == expected.n_batches
    assert torch.equal(background.batches["table0"], expected.batches["table0"])
    assert torch.equal(background.reads["table0"], expected.reads["table0"])


@pytest.mark.parametrize(
    ("window", "steps"),
    # Two steps of three sequences fill a window of 5, and the last full window is still counted.
    [(100, [1, 3, 5, 7, 9]), (5, [5, 7, 9]), (3, [9])],
)
def test_counts_are_of_the_last_windows(window: int, steps: list[int]) -> None:
    raw, watching = jobs.Raw(), counter(window=window)
    jobs.fit([*MEMORY, "trainer.accumulate_grad_batches=2"], 10, [watching, raw])
    assert_equal(watching.state_dict(), recount(raw, steps))


@pytest.mark.parametrize("window", [5, 7])
def test_a_resumed_training_counts_on_and_trains_alike(window: int, tmp_path: Path) -> None:
    constant = [*MEMORY, "optim.schedule=linear", "optim.warmup_share=0", "optim.final_factor=1"]
    watching, half, rest = (counter(window=window) for _ in range(3))
    _, _, losses = jobs.fit(constant, 9, [watching])
    _, trainer, _ = jobs.fit(constant, 5, [half])
    trainer.save_checkpoint(tmp_path / "5.ckpt")
    jobs.fit(constant, 9, [rest], done=5, ckpt_path=tmp_path / "5.ckpt")
    state, expected = rest.state_dict(), watching.state_dict()
    assert state["counted_steps"] == expected["counted_steps"] == 5
    assert_equal(state, ReadBackground.from_state(expected["background"]))
    _, _, alone = jobs.fit(constant, 9, [])
    assert losses == alone


def counts_of_rank(save: str) -> dict[str, Any]:
    watching = counter(sequences=2)
    _, trainer, _ = jobs.fit(["strategy=ddp", *MEMORY[1:]], 4, [watching])
    trainer.save_checkpoint(save)
    return watching.state_dict()


@pytest.mark.slow
def test_ranks_add_up_and_their_checkpoint_continues_in_one_process(ranks: Groups, tmp_path: Path) -> None:
    path = str(tmp_path / "4.ckpt")
    states = ranks(2).run(counts_of_rank, path)
    raw = jobs.Raw()
    jobs.fit(MEMORY, 4, [raw])
    whole = recount(raw, [1, 3], sequences=6)
    for state in states:
        background = ReadBackground.from_state(state["background"])
        # Two sequences of each rank, that is the sequences 0, 1, 4 and 5 of the global batch.
        assert background.n_batches == 8
        assert int(background.reads["table0"].sum()) < int(whole.reads["table0"].sum())
    resumed = counter(sequences=2)
    jobs.fit(MEMORY, 6, [resumed], done=4, ckpt_path=path)
    assert ReadBackground.from_state(resumed.state_dict()["background"]).n_batches == 10


def test_models_without_tables_and_large_ones_are_not_counted() -> None:
    for overrides, changes in ((["strategy=single", "ffn=dense"], {}), (MEMORY, {"max_slots": 255})):
        watching = counter(**changes)
        jobs.fit(overrides, 2, [watching])
        assert watching.state_dict() == {}


@pytest.mark.parametrize("key", ["every_n_steps", "sequences", "window", "max_slots"])
def test_numbers_out_of_range_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"callbacks.read_background.{key}=0"):
        counter(**{key: 0})
