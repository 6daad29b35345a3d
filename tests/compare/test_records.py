"""Runs read back from directories of any layout, with the reasons of failures."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import held_elsewhere
from run_folders import FakeRun

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.records import read_runs
from pkm_lightning.compare.run_files import read_metrics
from pkm_lightning.compare.run_state import run_state
from pkm_lightning.errors import RunDirectoryError


def test_variants_are_named_by_their_folders_and_sorted(tmp_path: Path) -> None:
    for variant, seed in (("b", 2), ("b", 1), ("a", 1)):
        FakeRun(variant, seed).write(tmp_path)
    runs, comparisons = read_runs([tmp_path])
    assert [(run.variant, run.seed) for run in runs] == [("a", 1), ("b", 1), ("b", 2)]
    assert comparisons == []


def test_loose_runs_are_named_by_their_ffn_and_their_differences(tmp_path: Path) -> None:
    FakeRun("", 1, ffn="MoE").write(tmp_path, "monday")
    FakeRun("", 1).write(tmp_path, "tuesday")
    FakeRun("", 2).write(tmp_path, "wednesday")
    FakeRun("", 1, config={"model": {"dim": 128}}).write(tmp_path, "thursday")
    FakeRun("", 1, ffn="MemoryPlus + Engram").write(tmp_path, "friday")
    runs, _ = read_runs([tmp_path])
    assert [(run.variant, run.seed) for run in runs] == [
        ("memory_plus+engram", 1),
        ("moe", 1),
        ("memory_plus model.dim=128", 1),
        ("memory_plus model.dim=64", 1),
        ("memory_plus model.dim=64", 2),
    ]


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ((0.004130399570052626, 0.5), ("0.00413", "0.5")),
        ((0.00413039, 0.00413041, 0.5), ("0.00413039", "0.00413041", "0.5")),
    ],
)
def test_drawn_numbers_are_short_in_names_unless_they_would_be_one(
    tmp_path: Path, rates: tuple[float, ...], shown: tuple[str, ...]
) -> None:
    for i, rate in enumerate(rates):
        FakeRun("", 1, config={"optim": {"lr": rate}}).write(tmp_path, str(i))
    names = {run.variant for run in read_runs([tmp_path])[0]}
    assert names == {f"memory_plus optim.lr={rate}" for rate in shown}


def test_sweeps_and_speed_tests_are_not_reported(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "runs")
    FakeRun("a", 1001).write(tmp_path / "sweep")
    FakeRun("a", 0).write(tmp_path / "speed", "a/try-1")
    Comparison(command=[], base=[], variants={"a": []}).save(tmp_path)
    runs, comparisons = read_runs([tmp_path])
    assert [(run.variant, run.seed) for run in runs] == [("a", 1)]
    assert len(comparisons) == 1


def test_comparisons_are_found_below_the_folder(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "mine" / "runs")
    FakeRun("lr-0.1", 1001).write(tmp_path / "mine" / "sweep" / "a")
    Comparison(command=[], base=[], variants={"a": []}).save(tmp_path / "mine")
    FakeRun("b", 1).write(tmp_path / "sweep")
    runs, comparisons = read_runs([tmp_path])
    assert [run.variant for run in runs] == ["a", "b"]
    assert len(comparisons) == 1


def test_a_comparison_around_the_folder_is_found(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "mine" / "runs")
    FakeRun("lr-0.1", 1001).write(tmp_path / "mine" / "sweep" / "a")
    Comparison(command=[], base=["x=1"], variants={"a": []}).save(tmp_path / "mine")
    runs, (comparison,) = read_runs([tmp_path / "mine" / "runs"])
    assert ([run.variant for run in runs], comparison.base) == (["a"], ["x=1"])
    with pytest.raises(RunDirectoryError, match=r"no record of a run .* except those of a sweep"):
        read_runs([tmp_path / "mine" / "sweep"])


@pytest.mark.parametrize("inner", ["alpha", "zeta"])
def test_a_comparison_inside_another_keeps_its_own(tmp_path: Path, inner: str) -> None:
    for root in (tmp_path, tmp_path / inner):
        root.mkdir(exist_ok=True)
        Comparison(
            command=[], base=[], variants={}, failures={"runs/b/seed-1": "no luck"} if root != tmp_path else {}
        ).save(root)
    FakeRun("a", 1001).write(tmp_path / inner / "sweep")
    FakeRun("b", 1, record={"status": "running"}).write(tmp_path / inner / "runs")
    runs, _ = read_runs([tmp_path])
    assert [(run.variant, run.failure) for run in runs] == [("b", "no luck")]


def test_a_run_of_several_directories_counts_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        FakeRun("dense_1x", 1).write(tmp_path / name / "runs")
    runs, _ = read_runs([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "runs"])
    assert len(runs) == 1


def test_the_finished_one_of_equal_runs_counts(tmp_path: Path) -> None:
    FakeRun("a", 1, record={"status": "interrupted", "data": None}).write(tmp_path / "one")
    FakeRun("a", 1).write(tmp_path / "two")
    (run,), _ = read_runs([tmp_path / "one", tmp_path / "two"])
    assert run.ok


def test_equal_configurations_of_two_commits_are_not_equal_runs(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "one")
    FakeRun("a", 1, record={"commit": "decade"}).write(tmp_path / "two")
    with pytest.raises(RunDirectoryError, match="but differ"):
        read_runs([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_two_different_runs_of_one_name_and_seed_are_refused(tmp_path: Path, status: str) -> None:
    FakeRun("a", 1).write(tmp_path / "one")
    FakeRun("a", 1, config={"optim": {"lr": 0.1}}, record={"status": status}).write(tmp_path / "two")
    with pytest.raises(RunDirectoryError, match="both a with seed 1, but differ"):
        read_runs([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize(
    ("record", "failure"),
    [
        ({}, ""),
        ({"status": "failed", "reason": "out of memory"}, "out of memory"),
        ({"status": "interrupted"}, "interrupted"),
        ({"status": "running"}, "interrupted"),
        ({"metrics": {"test/loss": None}}, "diverged: the final loss is not finite"),
    ],
)
def test_the_reason_of_a_failure_is_read(tmp_path: Path, record: dict[str, object], failure: str) -> None:
    FakeRun("a", 1, record=record).write(tmp_path)
    ((run,), _) = read_runs([tmp_path])
    assert run.failure == failure
    assert run.ok is not bool(failure)


def test_the_last_output_of_a_process_is_the_reason(tmp_path: Path) -> None:
    """Covers a killed run, whose record has no reason, and a refused one, which has no record."""
    FakeRun("a", 1, record={"status": "running"}).write(tmp_path / "runs")
    reasons = {"runs/a/seed-1": "killed by SIGKILL (out of memory?)", "runs/b/seed-1": "data.path does not exist"}
    Comparison(command=[], base=[], variants={"a": [], "b": []}, failures=reasons).save(tmp_path)
    runs, _ = read_runs([tmp_path])
    assert {run.variant: run.failure for run in runs} == {"a": reasons["runs/a/seed-1"], "b": reasons["runs/b/seed-1"]}


def test_the_state_of_a_directory(tmp_path: Path) -> None:
    assert run_state(tmp_path / "none") == "absent"
    folder = FakeRun("a", 1, record={"status": "running"}).write(tmp_path)
    assert run_state(folder) == "interrupted"
    assert not (folder / ".lock").exists()


def test_a_directory_that_another_process_holds_is_held(tmp_path: Path) -> None:
    folder = FakeRun("a", 1, record={"status": "running"}).write(tmp_path)
    with held_elsewhere(folder):
        assert run_state(folder) == "held"
    assert run_state(folder) == "interrupted"


def test_a_lock_of_this_process_does_not_count(tmp_path: Path) -> None:
    folder = FakeRun("a", 1).write(tmp_path)
    with (folder / ".lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        assert run_state(folder) == "finished"


def _with_one_answer_flipped(lines: list[str]) -> list[str]:
    place = lines[0].split(",").index("exact")
    cells = lines[1].split(",")
    cells[place] = "0" if cells[place] == "1" else "1"
    return [lines[0], ",".join(cells), *lines[2:]]


@pytest.mark.parametrize(
    "damage",
    [lambda lines: lines[:6], lambda lines: [*lines, *lines[1:]], _with_one_answer_flipped],
    ids=["cut short", "each twice", "one flipped"],
)
def test_answers_that_contradict_the_record_are_refused(
    tmp_path: Path, damage: Callable[[list[str]], list[str]]
) -> None:
    file = FakeRun("a", 1).write(tmp_path) / "recall.csv"
    file.write_text("\n".join(damage(file.read_text().splitlines())) + "\n")
    (run,), _ = read_runs([tmp_path])
    assert run.failure == "its files are damaged (recall.csv and run.json differ about paraphrase)"


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,tokens,seconds,train/loss\n1,10,3,2.5\n2,2e")
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1.0, "tokens": 10.0, "seconds": 3.0, "train/loss": 2.5}]


@pytest.mark.parametrize("make", [True, False])
def test_a_directory_without_runs_is_refused(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(RunDirectoryError, match="holds no record of a run" if make else "is not a directory"):
        read_runs([folder])


def test_a_run_may_have_numbers_that_were_not_finite(tmp_path: Path) -> None:
    folder = FakeRun("a", 1).write(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["tokens_per_second"] = None
    (folder / "run.json").write_text(json.dumps(record))
    assert read_runs([tmp_path])[0][0].ok


def test_runs_of_a_sweep_over_many_keys_have_names_of_their_own(tmp_path: Path) -> None:
    for i, heads in enumerate((1, 2, 4)):
        config = {"a": {"c": i % 2, "d": i % 2, "e": i % 2}, "ffn": {"heads": heads}}
        FakeRun("x", 1, config=config).write(tmp_path, str(i))
    runs, _ = read_runs([tmp_path])
    assert len({run.variant for run in runs}) == 3
    assert all(f"ffn.heads={run.config['ffn']['heads']}" in run.variant for run in runs)


def test_a_pruned_run_says_why_it_has_no_results(tmp_path: Path) -> None:
    FakeRun("a", 1, record={"status": "pruned", "reason": "worse than the median"}).write(tmp_path)
    ((run,), _) = read_runs([tmp_path])
    assert run.failure == "pruned: worse than the median"
