"""The head of a report claims what intervals allow: won, not separated, at a limit, one seed, equal seconds, failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun
from studies import SETTINGS, study_of

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.headline import headline
from pkm_lightning.compare.pages import render_pages
from pkm_lightning.compare.report import MARK
from pkm_lightning.compare.study import Study, make_study

EQUAL = "equal tokens, FLOPs per token and parameters"


def runs_of(known: dict[str, float], seeds: tuple[int, ...] = (1, 2, 3), **more: Any) -> list[FakeRun]:
    more = {"n_facts": 200, **more}
    return [
        FakeRun(variant, seed, value, "Dense" if variant == "dense" else "MemoryPlus", **more)
        for variant, value in known.items()
        for seed in seeds
    ]


def interval(study: Study, variant: str, other: str, sign: int = 1) -> list[str]:
    """Returns a difference and the ends of its interval in points, without the headline's own words."""
    assert study.resampled is not None
    point, *ends = (100 * sign * value for value in study.resampled.difference(variant, other))
    return [f"{value:.1f}" for value in (point, *sorted(ends))]


def test_a_variant_that_is_ahead_and_one_that_is_not_separated_from_it(tmp_path: Path) -> None:
    study = study_of(tmp_path, *runs_of({"dense": 0.3, "moe": 0.79, "memory": 0.8, "pkm": 0.5}))
    assert study.resampled is not None
    mean = study.resampled.mean
    lead, level = sorted(("memory", "moe"), key=lambda variant: -mean[variant])
    ahead, behind = interval(study, lead, "dense"), [float(end) for end in interval(study, level, lead)]
    head = headline(study)
    assert head.answer == (
        f"At {EQUAL}, with 3 seeds, {lead} recalls {mean[lead]:.1%} of held-out paraphrases, {ahead[0]} points "
        f"({ahead[1]} to {ahead[2]}) more than dense, and at equal seconds, by validations during training, "
        f"{mean[lead]:.1%} against {mean['dense']:.1%}; not separated from it: {level} ({behind[0]:+} points, "
        f"{behind[1]:+} to {behind[2]:+})."
    )
    assert head.side_by_side is not None
    assert [row[:3] for row in head.side_by_side.rows[:2]] == [
        ["equal tokens: the final test", f"{mean[lead]:.1%}", f"{mean['dense']:.1%}"],
        ["equal seconds (100 s): by validations", f"{mean[lead]:.1%}", f"{mean['dense']:.1%}"],
    ]
    assert head.remarks == ["3 seeds: the intervals understate how much seeds differ."]
    sizes = [
        FakeRun(name, 1, known, "Dense", flops, n_facts=200)
        for name, known, flops in (("dense", 0.3, 1000), ("wide", 0.9, 4000))
    ]
    ahead_of_all = headline(study_of(tmp_path / "ladder", *sizes, *runs_of({"pkm": 0.5, "memory": 0.8}, seeds=(1,))))
    assert ahead_of_all.answer.endswith("; it is separated from every other variant outside the dense ladder.")
    assert ahead_of_all.multiplier.startswith("For the quality of memory a dense model needs ")


def test_a_difference_whose_interval_includes_0_is_no_win(tmp_path: Path) -> None:
    study = study_of(tmp_path, *runs_of({"dense": 0.50, "moe": 0.51, "memory": 0.511}, n_facts=40))
    answer = headline(study).answer
    assert "interval that includes 0" in answer or "not separated from dense" in answer
    # Two seeds that learned all and one that learned little have the best mean, and no separate one.
    unsteady = [FakeRun("memory", seed, value, n_facts=200) for seed, value in ((1, 1.0), (2, 1.0), (3, 0.1))]
    study = study_of(tmp_path / "unsteady", *runs_of({"dense": 0.4, "moe": 0.6}), *unsteady)
    answer = headline(study).answer
    assert "memory recalls" in answer
    assert f"an interval that includes 0; separated from dense: moe (+{interval(study, 'moe', 'dense')[0]} " in answer


def test_a_reference_that_nobody_beats_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, *runs_of({"dense": 0.8, "memory": 0.4}))
    less = interval(study, "memory", "dense", sign=-1)
    expected = f"; next is memory, {less[0]} points ({less[1]} to {less[2]}) less, and at equal seconds"
    answer = headline(study).answer
    assert answer.startswith(f"At {EQUAL}, with 3 seeds, no variant is better than dense, which recalls ")
    assert expected in answer


@pytest.mark.parametrize(("known", "limit"), [(1.0, "At the ceiling, 95% or more: "), (0.0, "At the floor, ")])
def test_variants_at_a_limit_are_named(tmp_path: Path, known: float, limit: str) -> None:
    head = headline(study_of(tmp_path, *runs_of({"dense": known, "memory": known}, seeds=(1,), n_facts=20)))
    assert any(remark.startswith(limit) and "dense and memory" in remark for remark in head.remarks)
    answers = {
        1.0: "no variant is better than dense, which recalls 100.0% of held-out paraphrases; next is memory, 0.0 "
        "points (0.0 to 0.0) more, and at equal seconds, by validations during training, 100.0% against 100.0%; not "
        "separated from dense: memory (+0.0 points, +0.0 to +0.0).",
        0.0: "dense recalls 0.0% of held-out paraphrases, no more than of subjects never trained (0.0%), and no other "
        "variant does.",
    }
    assert head.answer == f"At {EQUAL}, with one seed, {answers[known]}"
    middle = headline(study_of(tmp_path / "middle", *runs_of({"dense": 0.4, "memory": 0.6}, seeds=(1,))))
    assert not [remark for remark in middle.remarks if "At the" in remark]


def test_one_seed_is_said(tmp_path: Path) -> None:
    head = headline(study_of(tmp_path, *runs_of({"dense": 0.3, "memory": 0.8}, seeds=(1,))))
    assert ", with one seed, memory recalls " in head.answer
    assert any(remark.startswith("One seed: ") for remark in head.remarks)
    loss = headline(study_of(tmp_path / "loss", *runs_of({"dense": 0.25, "memory": 0.75}, seeds=(1,), forms=())))
    assert ", memory has a test/loss of 0.250, 0.500 less than dense" in loss.answer
    assert loss.answer.endswith("; without several seeds or questions this difference has no interval.")


def test_equal_seconds_and_equal_tokens_change_places(tmp_path: Path) -> None:
    fewer = {"record": {"tokens": 400_000}}
    for run in [*runs_of({"dense": 0.3}), *runs_of({"memory": 0.8}, **fewer)]:
        run.write(tmp_path / "runs")
    Comparison(command=[], base=[], variants={"dense": [], "memory": []}, seeds=[1, 2, 3], seconds=100).save(tmp_path)
    study = make_study([tmp_path], SETTINGS)
    assert study.resampled is not None
    head = headline(study)
    mean = {variant: f"{value:.1%}" for variant, value in study.resampled.mean.items()}
    assert head.answer.startswith(
        f"At {EQUAL.replace('tokens', 'seconds')}, with 3 seeds, memory recalls {mean['memory']}"
    )
    # A run that ended before keeps its last value.
    assert (
        f", and at equal tokens, by validations during training, {mean['memory']} against {mean['dense']}"
        in head.answer
    )
    assert dict(head.circumstances)["budget"].startswith("100 training seconds per run, 400 k to 1.00 M tokens per run")


def test_failed_and_missing_runs_are_said(tmp_path: Path) -> None:
    failed = [FakeRun("peer", seed, record={"status": "failed", "reason": "no memory"}) for seed in (1, 2)]
    study = study_of(tmp_path, *runs_of({"dense": 0.3, "memory": 0.8}), *failed)
    assert (
        "2 runs have no results (peer seed 1 and peer seed 2). Missing from the answer: peer."
        in headline(study).remarks
    )
    none = study_of(tmp_path / "none", *failed)
    assert headline(none).answer == "No run has results."
    assert "**No run has results.**" in render_pages(none, [], MARK)["report.md"]
    FakeRun("dense", 1).write(tmp_path / "started" / "runs")
    Comparison(command=["compare", "experiment=slots"], base=[], variants={"dense": [], "b": []}, seeds=[1]).save(
        tmp_path / "started"
    )
    head = headline(make_study([tmp_path / "started"], SETTINGS))
    assert head.answer.startswith("So far, at equal tokens, with one seed, dense recalls ")
    assert "experiment=slots" in dict(head.circumstances)["question"]


def test_unequal_costs_are_said(tmp_path: Path) -> None:
    costly = runs_of({"memory": 0.8}, flops=3000, record={"params": {"total": 40_000}, "tokens": 3_000_000})
    head = headline(study_of(tmp_path, *runs_of({"dense": 0.3}), *costly))
    assert head.answer.startswith(
        "At equal parameters (tokens and FLOPs per token differ), with 3 seeds, memory recalls "
    )
    assert any("differ in more than the FFN" in remark for remark in head.remarks)
