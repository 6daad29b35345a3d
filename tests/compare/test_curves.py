"""Curves over the course of runs, and the cost of a run, from their files alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import FakeRun
from tolerances import EXACT_FLOAT

from pkm_lightning.compare.costs import cost, training_cost
from pkm_lightning.compare.curves import curve, mean_curve, quality_at
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run, read_runs


def runs(root: Path, *fakes: FakeRun) -> list[Run]:
    for fake in fakes:
        fake.write(root)
    return read_runs([root])[0]


def test_a_mean_covers_the_validations_that_all_seeds_have(tmp_path: Path) -> None:
    whole, short = runs(tmp_path, FakeRun("a", 1, seconds=100), FakeRun("a", 2, seconds=200))
    lines = (tmp_path / "a" / "seed-2" / "metrics.csv").read_text().splitlines()
    (tmp_path / "a" / "seed-2" / "metrics.csv").write_text("\n".join(lines[:15]) + "\n")
    whole, short = read_runs([tmp_path])[0]
    for pair in ([whole, short], [short, whole]):
        x, mean, low, high = mean_curve(pair, "val/recall_paraphrase", "seconds")
        values = np.stack([curve(run, "val/recall_paraphrase", "seconds")[1][:7] for run in (whole, short)])
        np.testing.assert_allclose(x, np.arange(15, 106, 15), rtol=EXACT_FLOAT)
        np.testing.assert_allclose(mean, values.mean(0), rtol=EXACT_FLOAT)
        np.testing.assert_array_equal(low, values.min(0))
        np.testing.assert_array_equal(high, values.max(0))
    assert all(not len(part) for part in mean_curve([], "val/loss", "tokens"))


def test_quality_at_a_moment_lies_between_two_validations(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, FakeRun("a", 1, seconds=100))
    end = curve(run, "val/recall_paraphrase", "seconds")[1][-1]
    recall = Quality("recall_paraphrase")
    assert quality_at(run, recall, "seconds", 45) == pytest.approx(end * (0.4**2 + 0.5**2) / 2, rel=EXACT_FLOAT)
    assert quality_at(run, recall, "seconds", 1000) == end
    assert math.isnan(quality_at(run, recall, "seconds", 9))


def test_compute_counts_the_trunk_or_the_model_over_all_tokens(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, FakeRun("a", 1, flops=1000))
    assert cost(run, "trunk_flops_forward") == 1000
    assert training_cost(run, "trunk") == 3000 * 1_000_000
    assert training_cost(run, "model") == 4500 * 1_000_000
    assert training_cost(run, "time") == 100
    assert training_cost(run, "processor") == 200
    assert list(curve(run, "val/loss", "active_flops")[0][:2]) == [3000 * 100_000, 3000 * 200_000]


def test_a_plugin_that_states_no_cost_has_only_parameters_and_seconds(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, FakeRun("a", 1, flops=1000, record={"unknown_cost": ["Mine"]}))
    assert math.isnan(cost(run, "trunk_flops_train"))
    assert math.isnan(cost(run, "bytes_decode"))
    assert cost(run, "params_total") == 40_000
    assert cost(run, "seconds_train") == 100
