"""Differences between all variants against a recomputation by counting, and how a table shows many of them."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from run_folders import FakeRun
from studies import study_of, table
from tolerances import EXACT_FLOAT

from pkm_lightning.compare import pairs
from pkm_lightning.compare.pages import render_pages
from pkm_lightning.compare.pairs import pair_table, pairs_csv
from pkm_lightning.compare.report import MARK

SEEDS, FACTS, RESAMPLES = (1, 2, 3), 31, 200
KNOWN = {"a": 0.2, "b": 0.7, "c": 0.75}


def answers(folder: Path) -> list[int]:
    """Returns whether each question was answered, in the order in which all runs share them."""
    with (folder / "recall.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["form"] == "paraphrase"]
    return [int(row["exact"]) for row in sorted(rows, key=lambda row: (row["relation"], row["prompt"], row["truth"]))]


def percentile(values: list[float], share: float) -> float:
    """Interpolates between the two values around a percentile."""
    ordered, place = sorted(values), share * (len(values) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def test_every_difference_equals_a_recomputation_by_counting(tmp_path: Path) -> None:
    """Draws seeds and facts as the bootstrap does, then adds up single answers."""
    study = study_of(
        tmp_path, *(FakeRun(v, seed, known, n_facts=FACTS) for v, known in KNOWN.items() for seed in SEEDS)
    )
    right = {v: [answers(tmp_path / v / f"seed-{seed}") for seed in SEEDS] for v in KNOWN}
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(len(SEEDS), [1 / len(SEEDS)] * len(SEEDS), size=RESAMPLES)
    facts = rng.multinomial(FACTS, [1 / FACTS] * FACTS, size=RESAMPLES)

    def mean(variant: str, n_of_seed: list[int], n_of_fact: list[int]) -> float:
        total = sum(
            n_of_seed[s] * n_of_fact[f] * right[variant][s][f] for s, f in itertools.product(range(3), range(FACTS))
        )
        return total / (len(SEEDS) * FACTS)

    rows = {(row["variant"], row["minus"]): row for row in csv.DictReader(io.StringIO(pairs_csv(study)))}
    assert set(rows) == {("b", "a"), ("c", "a"), ("c", "b")}
    shown = table(study, "Differences between all variants")
    for (variant, other), row in rows.items():
        point = mean(variant, [1] * 3, [1] * FACTS) - mean(other, [1] * 3, [1] * FACTS)
        resampled = [mean(variant, *draw) - mean(other, *draw) for draw in zip(seeds, facts, strict=True)]
        ends = [percentile(resampled, share) for share in (0.025, 0.975)]
        assert float(row["difference"]) == pytest.approx(point, rel=EXACT_FLOAT)
        assert [float(row["low"]), float(row["high"])] == pytest.approx(ends, rel=EXACT_FLOAT)
        assert row["excludes_zero"] == str(int(ends[0] > 0 or ends[1] < 0))
        assert shown[variant][other] == f"{100 * point:+.1f} ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
        assert shown[other][variant] == f"{-100 * point:+.1f} ({-100 * ends[1]:+.1f} to {-100 * ends[0]:+.1f})"
    assert [row["excludes_zero"] for row in rows.values()] == ["1", "1", "0"]
    assert list(shown) == ["c", "b", "a"], "the best first"


def test_the_table_marks_which_intervals_exclude_zero(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, *(FakeRun(v, seed, known, n_facts=FACTS) for v, known in KNOWN.items() for seed in SEEDS)
    )
    shown = pair_table(study)
    assert shown is not None
    assert [column.name for column in shown.columns] == ["row minus column", "c", "b", "a"]
    assert (shown.strong, shown.pale) == ({(0, 3), (1, 3), (2, 1), (2, 2)}, {(0, 2), (1, 1)})
    assert "percentage points" in shown.note
    pages = render_pages(study, [], MARK)
    number, _, interval = shown.rows[0][3].partition(" ")
    assert f"| **{number}** {interval} |" in pages["report.md"]
    assert f'<td class="strong">{number} <small>{interval}</small></td>' in pages["report.html"]


def test_losses_of_one_seed_have_differences_without_intervals(tmp_path: Path) -> None:
    study = study_of(tmp_path, *(FakeRun(v, 1, known, forms=()) for v, known in (("a", 0.5), ("b", 0.75))))
    shown = pair_table(study)
    assert shown is not None
    assert shown.rows == [["b", "", "-0.250"], ["a", "+0.250", ""]], "less loss comes first"
    assert not shown.strong
    assert "no difference has an interval" in shown.note
    assert pairs_csv(study).splitlines()[1] == "b,a,test/loss,-0.25,,,"


def test_one_variant_has_no_pairs_and_many_do_not_fill_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_SHOWN", 3)
    assert pair_table(study_of(tmp_path / "one", FakeRun("a", 1))) is None
    names = ["dense", *(f"memory_plus ffn.heads={i} ffn.knn={i}" for i in range(4))]
    runs = [FakeRun(v, 1, 0.1 + 0.2 * i, ffn="MemoryPlus" if i else "Dense") for i, v in enumerate(names)]
    study = study_of(tmp_path / "many", *runs)
    shown = pair_table(study)
    assert shown is not None
    assert [row[0] for row in shown.rows] == [f"1: {names[4]}", f"2: {names[3]}", "3: dense"], "and the reference"
    assert [column.name for column in shown.columns[1:]] == ["1", "2", "3"]
    assert "The best 3 of 5 variants" in shown.note
    assert "Of 10 intervals about 0 would" not in shown.note
    assert len(pairs_csv(study).splitlines()) == 1 + 10
