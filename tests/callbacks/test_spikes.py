"""Robust scores equal a plain recomputation; the window skips what is not finite, and continues after a resume."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkm_lightning.callbacks.event_policies import StepEvents
from pkm_lightning.callbacks.spikes import SpikeWindow

VALUES = st.one_of(
    st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 2)), st.just(math.nan), st.just(math.inf)
)


def window(series: int = 1, size: int = 5, warm_up: int = 2, floor: float = 0.0) -> SpikeWindow:
    floors, relative = [floor] * series, [0.0 if floor else 0.01] * series
    return SpikeWindow(
        floors=floors, relative_floors=relative, window=size, warm_up=warm_up, device=torch.device("cpu")
    )


def lower_median(values: list[float]) -> float:
    return statistics.median_low(values)


def plain_score(value: float, kept: list[float], warm_up: int, floor: float) -> float:
    if len(kept) < warm_up:
        return 0.0
    last = kept[-5:]
    median = lower_median(last)
    spread = lower_median([abs(v - median) for v in last])
    return (value - median) / max(1.4826 * spread, floor * abs(median), 1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=25), st.integers(0, 10))
def test_scores_are_those_of_a_plain_recomputation(values: list[float], resumed: int) -> None:
    spikes, kept = window(), []
    for number, value in enumerate(values):
        if number == resumed:
            again = window()
            again.load_state_dict(spikes.state_dict())
            spikes = again
        found = float(spikes.scores(torch.tensor([value], dtype=torch.float64))[0])
        expected = plain_score(value, kept, 2, 0.01)
        assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
        spikes.add(torch.tensor([value], dtype=torch.float64))
        if math.isfinite(value):
            kept.append(value)


def test_series_are_apart_and_one_may_miss_values() -> None:
    spikes = window(series=2, size=4, warm_up=3)
    for value in (1.0, 1.1, 0.9, 1.0):
        spikes.add(torch.tensor([value, math.nan if value == 1.1 else 10 * value]))
    first, second = spikes.scores(torch.tensor([2.0, 10.0])).tolist()
    assert first > 5
    assert second == 0.0


def test_series_that_hardly_move_do_not_spike_at_nothing() -> None:
    spikes = window(warm_up=3)
    for _ in range(5):
        spikes.add(torch.tensor([2.0]))
    assert float(spikes.scores(torch.tensor([2.1]))[0]) == pytest.approx(5.0)


def test_a_floor_of_its_own_does_not_depend_on_the_level() -> None:
    for level in (0.0, 1.0, -5.0):
        spikes = window(warm_up=3, floor=0.01)
        for _ in range(5):
            spikes.add(torch.tensor([level], dtype=torch.float64))
        assert float(spikes.scores(torch.tensor([level + 0.02]).double())[0]) == pytest.approx(2.0, rel=1e-4)


def test_a_window_of_another_size_starts_anew() -> None:
    spikes = window(size=4)
    spikes.add(torch.tensor([3.0]))
    other = window(size=6)
    other.load_state_dict(spikes.state_dict())
    assert int(other.state_dict()["count"]) == 0


def test_a_step_far_above_its_window_is_an_event_at_once_or_when_drained() -> None:
    quiet, names = torch.tensor(1.0), ("loss", "grad_norm_dense")
    steps = {
        21: ({"loss": 1.3}, [("loss_spike", "loss")]),
        22: ({"grad_norm_dense": 2.0}, [("gradient_spike", "grad_norm_dense")]),
        23: ({"loss": 0.1, "grad_norm_dense": 0.1}, []),  # far below is no spike
        24: ({"loss": 1.05, "grad_norm_dense": 1.05}, []),  # 5 deviations
        25: ({"loss": math.nan, "grad_norm_dense": math.inf}, [("loss_not_finite", "loss")]),
    }
    for wait in (True, False):
        watched = StepEvents(window=20, warm_up=10, threshold=10.0, scaled_gradients=wait, device=torch.device("cpu"))
        for step in range(1, 21):
            assert watched.add(step, dict.fromkeys(names, quiet), wait=wait) == []
        for step, (changed, expected) in steps.items():
            figures = {name: torch.tensor(changed.get(name, 1.0)) for name in names}
            events = watched.add(step, figures, wait=wait)
            assert events == [] if not wait else [(e.name, e.figure) for e in events] == expected
        drained = [(event.step, event.name, event.figure) for event in watched.drain()]
        # Without a scaler a gradient that is not finite is an event as well.
        more = [] if wait else [(25, "gradient_not_finite", "grad_norm_dense")]
        assert drained == [(step, *event) for step, (_, events) in steps.items() for event in events] + more
        assert watched.drain() == []
