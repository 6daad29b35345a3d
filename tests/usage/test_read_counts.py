"""The counters of one reader against a list of all reads, through periods, gaps and resumes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkm_lightning.usage.read_counts import Counted, ReadCounts

N = 4
HERE = torch.device("cpu")
History = list[tuple[int, int]]  # step, slot


def assert_counts(found: Counted, reads: list[int]) -> None:
    assert found.counts_N.tolist() == [reads.count(slot) for slot in range(N)]
    assert found.weights_N.tolist() == [0.5 * reads.count(slot) for slot in range(N)]


def check(counts: ReadCounts, history: History, step: int, half: int, start: int = 0) -> None:
    counts.advance(step)
    first = max(((step - 1) // half - 1) * half, start)
    assert counts.window_steps(step) == step - first
    assert_counts(counts.ever(), [slot for _, slot in history])
    assert_counts(counts.window(), [slot for at, slot in history if at > first])
    last = [max([at for at, read in history if read == slot], default=start) for slot in range(N)]
    assert counts.last_N.tolist() == last


def add(counts: ReadCounts, slots: list[int], step: int) -> None:
    counts.add(torch.tensor([slots]), torch.full((1, len(slots)), -0.5), None, step)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, N - 1), max_size=5))))
def test_window_and_history_equal_a_plain_recount(half: int, plan: list[tuple[int, list[int]]]) -> None:
    counts, history, step = ReadCounts(N, half=half, device=HERE), [], 1
    for gap, slots in plan:
        step += gap
        if slots:
            add(counts, slots, step)
        history += [(step, slot) for slot in slots]
        check(counts, history, step, half)
        if gap == 5:  # a resume
            saved = counts.state(counts.amounts(), counts.last_N)
            counts = ReadCounts(N, half=half, device=HERE, step=step)
            counts.load(saved, holds_sums=True)


def test_what_a_checkpoint_holds_does_not_go_on_counting() -> None:
    counts = ReadCounts(N, half=2, device=HERE)
    add(counts, [1], 1)
    saved = counts.state(counts.amounts(), counts.last_N)
    add(counts, [1, 2], 2)
    assert saved["amounts"][0, 0].tolist() == [0, 1, 0, 0]
    assert saved["last"].tolist() == [0, 1, 0, 0]


def test_only_one_rank_takes_up_the_sums() -> None:
    counts = ReadCounts(N, half=2, device=HERE)
    add(counts, [1, 1], 1)
    saved = counts.state(counts.amounts(), counts.last_N)
    other = ReadCounts(N, half=2, device=HERE, step=1)
    other.load(saved, holds_sums=False)
    assert not other.ever().counts_N.any()
    assert other.last_N.tolist() == [0, 1, 0, 0]


def test_a_window_of_another_length_begins_anew() -> None:
    counts = ReadCounts(N, half=2, device=HERE)
    for step in range(1, 6):
        add(counts, [step % N], step)
    resumed = ReadCounts(N, half=3, device=HERE, step=5)
    resumed.load(counts.state(counts.amounts(), counts.last_N), holds_sums=True)
    assert_counts(resumed.ever(), [1, 2, 3, 0, 1])
    assert not resumed.window().counts_N.any()
    add(resumed, [2], 6)
    assert resumed.window_steps(6) == 1
    assert_counts(resumed.window(), [2])
    assert_counts(resumed.ever(), [1, 2, 3, 0, 1, 2])


def test_a_run_that_was_not_watched_from_its_start_calls_nothing_dead_yet() -> None:
    counts = ReadCounts(N, half=10, device=HERE, step=25)
    assert counts.last_N.tolist() == [25] * N
    assert counts.window_steps(27) == 2
