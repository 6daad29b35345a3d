"""The median stopping rule: which runs of a sweep end early, by what others had at the same step."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pkm_lightning.callbacks.median_stopping import MedianStopping
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import LanguageModule


def write(folder: Path, *rows: tuple[int, float | str]) -> None:
    """Writes the metrics.csv of a run: steps and validation losses."""
    folder.mkdir(parents=True)
    lines = [f"{step},{value}" for step, value in rows]
    (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *lines]) + "\n")


def validated(rule: MedianStopping, folder: Path, step: int, value: float, **config: Any) -> bool:
    """Ends a validation with this loss, and returns whether the run is to stop."""
    module = LanguageModule.__new__(LanguageModule)
    settings = {
        "sweep_dir": str(folder),
        "objective": "val/loss",
        "objective_mode": "min",
        "run_dir": str(folder / "me"),
    }
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, global_step=step, is_global_zero=True, callbacks=[],
        callback_metrics={"val/loss": value}, strategy=SimpleNamespace(broadcast=lambda reason: reason),
        should_stop=False,
    )  # fmt: skip
    object.__setattr__(module, "config", {**settings, "trainer": {"max_steps": 100}, **config})
    rule.on_validation_end(trainer, module)
    return bool(trainer.should_stop)


def rule(**changes: Any) -> MedianStopping:
    return MedianStopping(**{"min_runs": 3, "warm_up": 0.2, **changes})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three other runs, at 4, 3 and 2 in step 50; a fourth has not come that far."""
    for name, value in (("a", 4.0), ("b", 3.0), ("deep/c", 2.0)):
        write(tmp_path / name, (25, 5.0), (45, value), (50, ""), (75, 0.1))
    write(tmp_path / "d", (25, 9.0))
    write(tmp_path / "me", (50, 0.0))
    return tmp_path


@pytest.mark.parametrize(
    ("value", "changes", "stops"),
    [
        (3.1, {}, True),
        (3.0, {}, False),
        (math.nan, {}, True),
        (3.1, {"min_runs": 4}, False),
        (3.1, {"warm_up": 0.6}, False),
    ],
)
def test_a_run_that_is_worse_than_the_median_ends(sweep: Path, value: float, changes: Any, stops: bool) -> None:
    judge = rule(**changes)
    assert validated(judge, sweep, 50, value) == stops
    assert (judge.reason is not None) == stops
    if stops:
        assert "worse than the median 3 of 3 other runs of the sweep" in str(judge.reason)


def test_the_best_value_so_far_counts_over_a_resume(sweep: Path) -> None:
    first = rule()
    assert not validated(first, sweep, 25, 1.0)
    resumed = rule()
    resumed.load_state_dict(first.state_dict())
    assert not validated(resumed, sweep, 50, 8.0)


def test_more_is_better_where_the_objective_says_so(sweep: Path) -> None:
    assert validated(rule(), sweep, 50, 2.9, objective_mode="max")
    assert not validated(rule(), sweep, 50, 3.1, objective_mode="max")


def test_nothing_happens_outside_of_a_sweep_or_at_the_end(sweep: Path) -> None:
    assert not validated(rule(), sweep, 50, 9.0, sweep_dir=None)
    assert not validated(rule(), sweep, 50, 9.0, objective=None)
    assert not validated(rule(), sweep, 100, 9.0)


def test_settings_that_cannot_work_are_refused() -> None:
    for changes in ({"min_runs": 0}, {"warm_up": 1.5}):
        with pytest.raises(ConfigError, match=rf"callbacks\.median_stopping\.{next(iter(changes))}="):
            rule(**changes)
    with pytest.raises(ConfigError, match=r"callbacks\.metrics_csv is off; add that, or remove"):
        rule().check({"callbacks": {}, "sweep_dir": "runs/sweep"})
    rule().check({"callbacks": {}})
