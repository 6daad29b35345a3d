"""The paired bootstrap against scipy's, and the effect of pairing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_folders import FakeRun
from scipy import stats
from tolerances import BOOTSTRAP, EXACT_FLOAT, SAMPLED_VARIANCE

from pkm_lightning.compare.bootstrap import interval, resample
from pkm_lightning.compare.quality import Quality
from pkm_lightning.compare.records import Run, read_runs

RECALL = Quality("recall_paraphrase")


def variants(root: Path, *runs: FakeRun) -> dict[str, list[Run]]:
    for run in runs:
        run.write(root)
    grouped: dict[str, list[Run]] = {}
    for run in read_runs([root])[0]:
        grouped.setdefault(run.variant, []).append(run)
    return grouped


def test_means_are_plain_means_over_seeds_and_facts(tmp_path: Path) -> None:
    runs = variants(tmp_path, *(FakeRun("a", seed) for seed in (1, 2, 3)))
    exact = [run.answers["paraphrase"].exact for run in runs["a"]]
    assert resample(runs, RECALL, resamples=100, seed=0).mean["a"] == np.mean(exact)


def test_the_interval_over_facts_of_one_seed_equals_scipys(tmp_path: Path) -> None:
    runs = variants(tmp_path, FakeRun("a", 1, 0.3, n_facts=400))
    exact = runs["a"][0].answers["paraphrase"].exact.astype(float)
    theirs = stats.bootstrap((exact,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert resample(runs, RECALL, resamples=20_000, seed=0).interval("a") == pytest.approx(tuple(theirs), abs=BOOTSTRAP)


def test_the_interval_over_seeds_without_facts_equals_scipys(tmp_path: Path) -> None:
    losses = [0.2, 0.5, 0.4, 0.9, 0.6, 0.35]
    runs = [FakeRun("a", i, 1 - loss, forms=()) for i, loss in enumerate(losses)]
    found = resample(variants(tmp_path, *runs), Quality("test/loss"), resamples=20_000, seed=0)
    theirs = stats.bootstrap((losses,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert found.interval("a") == pytest.approx(tuple(theirs), abs=BOOTSTRAP)


def test_the_difference_of_variants_that_know_the_same_facts_is_certain(tmp_path: Path) -> None:
    """Answers the same questions in both variants: the noise of their common draws cancels."""
    runs = variants(tmp_path, *(FakeRun(name, seed, 0.5, flops=1000) for name in ("a", "b") for seed in (1, 2)))
    found = resample(runs, RECALL, resamples=500, seed=0)
    assert found.is_paired
    assert found.difference("b", "a") == (0.0, 0.0, 0.0)
    low, high = found.interval("a")
    assert low < found.mean["a"] < high


def test_the_paired_interval_of_a_difference_equals_scipys(tmp_path: Path) -> None:
    runs = variants(tmp_path, FakeRun("a", 1, 0.3, n_facts=300), FakeRun("b", 1, 0.6, n_facts=300))
    a, b = (runs[name][0].answers["paraphrase"].exact.astype(float) for name in ("a", "b"))
    theirs = stats.bootstrap(
        (b, a), lambda x, y: np.mean(x) - np.mean(y), paired=True, vectorized=False, method="percentile",
        n_resamples=5_000, rng=1,
    ).confidence_interval  # fmt: skip
    _, low, high = resample(runs, RECALL, resamples=20_000, seed=0).difference("b", "a")
    assert (low, high) == pytest.approx(tuple(theirs), abs=BOOTSTRAP)


def test_noise_of_single_answers_counts_as_often_as_the_pigeonhole_bootstrap_counts_it(tmp_path: Path) -> None:
    """Answers by coin flips: the resampled variance is (2 - 1/R)(2 - 1/F) - 1 times that of the mean (Owen 2007)."""
    n_seeds, n_facts = 3, 400
    runs = variants(tmp_path, *(FakeRun("a", seed, n_facts=n_facts) for seed in range(1, n_seeds + 1)))
    found = resample(runs, RECALL, resamples=20_000, seed=0)
    of_the_mean = 0.25 / (n_seeds * n_facts)
    expected = (2 - 1 / n_seeds) * (2 - 1 / n_facts) - 1
    assert np.var(found.resamples["a"]) / of_the_mean == pytest.approx(expected, rel=SAMPLED_VARIANCE)


def test_seeds_are_resampled_too(tmp_path: Path) -> None:
    """Draws two seeds, of which one knows everything and one nothing: the mean is 0, 1/2 or 1."""
    runs = variants(tmp_path, FakeRun("a", 1, 1.0), FakeRun("a", 2, 0.0))
    found = resample(runs, RECALL, resamples=4000, seed=0)
    shares = [np.mean(np.isclose(found.resamples["a"], value)) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=5 * BOOTSTRAP)


def test_variants_with_other_seeds_or_facts_are_not_paired(tmp_path: Path) -> None:
    seeds = variants(tmp_path / "seeds", FakeRun("a", 1), FakeRun("b", 2))
    facts = variants(tmp_path / "facts", FakeRun("a", 1), FakeRun("b", 1, data_seed=3))
    assert not resample(seeds, RECALL, resamples=100, seed=0).is_paired
    assert not resample(facts, RECALL, resamples=100, seed=0).is_paired


def test_common_seeds_and_facts_are_drawn_once(tmp_path: Path) -> None:
    """Keeps the facts of a variant paired that has lost a seed, and the draws of the other variants unchanged."""
    runs = [FakeRun(name, seed) for name in ("a", "b") for seed in (1, 2)]
    whole = resample(variants(tmp_path / "whole", *runs), RECALL, resamples=200, seed=0)
    fewer = resample(variants(tmp_path / "fewer", *runs, FakeRun("c", 1)), RECALL, resamples=200, seed=0)
    assert not fewer.is_paired
    assert fewer.difference("b", "a") == (0.0, 0.0, 0.0)
    np.testing.assert_array_equal(fewer.resamples["a"], whole.resamples["a"])
    alone = variants(tmp_path / "alone", FakeRun("a", 1), FakeRun("b", 2))
    facts = resample(alone, RECALL, resamples=2000, seed=0).resamples
    alike = variants(tmp_path / "alike", FakeRun("a", 1, 1.0), FakeRun("b", 2, 1.0))
    assert resample(alike, RECALL, resamples=10, seed=0).difference("a", "b") == (0.0, 0.0, 0.0)
    exact = [alone[name][0].answers["paraphrase"].exact.astype(float) for name in ("a", "b")]
    expected = np.corrcoef(*exact)[0, 1]
    assert np.corrcoef(facts["a"], facts["b"])[0, 1] == pytest.approx(expected, abs=10 * BOOTSTRAP)


def test_the_same_seed_gives_the_same_intervals(tmp_path: Path) -> None:
    runs = variants(tmp_path, *(FakeRun("a", seed) for seed in (1, 2, 3)))
    first, again, other = (resample(runs, RECALL, resamples=300, seed=seed) for seed in (0, 0, 1))
    assert first.interval("a") == again.interval("a")
    assert not np.array_equal(first.resamples["a"], other.resamples["a"])


def test_an_interval_holds_95_of_100() -> None:
    low, high = interval(np.arange(1001.0))
    assert (low, high) == pytest.approx((25.0, 975.0), rel=EXACT_FLOAT)
