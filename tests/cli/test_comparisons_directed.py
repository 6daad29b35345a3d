"""What `compare` decides over several sittings: rates, steps, who is run again. Its runs are stand-ins."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import held_elsewhere
from small import SMALL_RUN, Run
from tree import ROOT

from pkm_lightning.compare.schedule import ScheduledRun
from pkm_lightning.compare.processes import Processes

SMALL = [o for o in SMALL_RUN if not o.startswith(("~", "trainer."))]
SHORT = [*SMALL, "report.resamples=100", "out=out"]


@pytest.fixture
def compare(cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`compare` in this process, each of its runs a stand-in."""

    def command(self: Processes, run: ScheduledRun) -> list[str]:
        return [sys.executable, str(ROOT / "tests" / "fake_fit.py"), *run.overrides, f"run_dir={run.folder}"]

    monkeypatch.setattr(Processes, "command", command)
    monkeypatch.setattr("pkm_lightning.compare.processes.POLL", 0.02)
    monkeypatch.setattr("pkm_lightning.compare.report.all_plots", lambda study: ())
    return lambda *overrides: cli("compare", *overrides, *SHORT)


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return found


def fates(folder: Path, **of: Any) -> None:
    (folder / "fates.json").write_text(json.dumps(of))


@pytest.mark.parametrize("length", ["trainer.max_steps=10", pytest.param("budget.tokens=4e3", marks=pytest.mark.slow)])
def test_arms_warm_up_once(compare: Run, tmp_path: Path, length: str) -> None:
    warm = tmp_path / "out" / "speed" / "dense" / "warm-up" / "run.json"
    fates(tmp_path, **{"warm-up": "killed"})
    assert compare("ffn=dense", "seeds=1", "warm_up=false", length).code == 0
    assert compare("ffn=dense", "seeds=1", length).code == 0
    assert not warm.exists(), "an arm that has been run is warm"
    assert compare("ffn=dense", "seeds=1", "resume=never", length).code == 0
    assert json.loads(warm.read_text())["status"] == "running"
    fates(tmp_path)
    (tmp_path / "out" / "runs" / "dense").rename(tmp_path / "elsewhere")
    assert compare("ffn=dense", "seeds=1", length).code == 0
    assert json.loads(warm.read_text())["status"] == "finished", "one that was killed is not warm"
    before = warm.stat().st_mtime_ns
    assert compare("ffn=dense", "seeds=2", length).code == 0
    assert warm.stat().st_mtime_ns == before


def test_what_runs_were_begun_with_stays(compare: Run, tmp_path: Path) -> None:
    """A rate whose run was killed in the first sitting wins in the second: too late."""
    command = ["ffn=dense", "lr_sweep=[3e-3,6e-3]", "trainer.max_steps=10"]
    fates(tmp_path, **{"lr-0.006": "killed"})
    assert compare(*command, "seeds=1").code == 0
    fates(tmp_path)
    assert compare(*command, "seeds=2").code == 0
    sweep = content(tmp_path)["sweep"]
    assert sweep["results"]["dense"]["0.006"] == 1.0
    assert sweep["chosen"] == {"dense": 0.003}
    configs = [yaml.safe_load(file.read_text()) for file in (tmp_path / "out" / "runs").glob("dense/*/config.yaml")]
    assert [config["optim"]["lr"] for config in configs] == [0.003, 0.003]
    assert "differ in more" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("trainer.max_steps=10", ["+variants.moe={ffn.top_k: 4}", "trainer.max_steps=10"], "moe is ffn=moe there"),
        ("trainer.max_steps=10", ["trainer.max_steps=20"], "trainer.max_steps=.* is not said by both"),
        ("budget.tokens=4e3", ["budget.tokens=8e3"], "dense is .*trainer.max_steps=.* there"),
        ("budget.tokens=4e3", ["budget.tokens=1"], "is less than a step"),
    ],
)
def test_a_refused_command_changes_nothing(
    compare: Run, tmp_path: Path, first: str, second: list[str], message: str
) -> None:
    assert compare("ffn=dense,moe", "seeds=1", "warm_up=false", first).code == 0
    before = (tmp_path / "out" / "compare.json").read_text()
    refused = compare("ffn=dense,moe", "seeds=3", *second)
    assert refused.code == 2
    assert re.search(message, refused.err)
    assert (tmp_path / "out" / "compare.json").read_text() == before
    assert not (tmp_path / "out" / "speed").exists()


def test_a_refused_command_that_would_start_afresh_removes_nothing(compare: Run, tmp_path: Path) -> None:
    assert compare("ffn=dense", "seeds=1", "warm_up=false", "trainer.max_steps=10").code == 0
    refused = compare("ffn=dense", "seeds=1", "resume=never", "budget.tokens=1")
    assert "is less than a step" in refused.err
    assert (tmp_path / "out" / "runs" / "dense" / "seed-1" / "run.json").exists()


def test_all_commands_that_made_a_comparison_are_told(compare: Run, tmp_path: Path) -> None:
    common = ["warm_up=false", "trainer.max_steps=10"]
    for seeds in ("seeds=1", "seeds=2", "seeds=1"):
        assert compare("ffn=dense", *common, seeds).code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.index("seeds=2") < report.index("seeds=1")
    assert report.count("python -m pkm_lightning compare") == 2


def test_a_directory_may_be_named_by_a_number(compare: Run, cli: Run, tmp_path: Path) -> None:
    assert compare("ffn=dense", "seeds=1", "warm_up=false", "trainer.max_steps=10").code == 0
    (tmp_path / "out").rename(tmp_path / "2024")
    assert cli("report", "runs=[2024]", "out=2025").code == 0
    assert (tmp_path / "2025" / "report.md").exists()


def test_a_command_ends_as_its_own_runs_did(compare: Run, tmp_path: Path) -> None:
    fates(tmp_path, **{"runs/moe": "failed"})
    common = ["seeds=1", "trainer.max_steps=10", "warm_up=false"]
    failed = compare("ffn=dense,moe", *common)
    assert failed.code == 2
    assert "moe seed 1" in failed.err
    assert "resume=always" in failed.err
    assert compare("ffn=dense", *common).code == 0
    fates(tmp_path)
    assert compare("ffn=dense,moe", *common).code == 2
    assert compare("ffn=dense,moe", *common, "resume=always").code == 0
    assert content(tmp_path)["failures"] == {}


def test_why_a_run_was_killed_is_known_after_commands_about_others(compare: Run, tmp_path: Path) -> None:
    fates(tmp_path, **{"runs/moe": "killed"})
    common = ["seeds=1", "trainer.max_steps=10", "warm_up=false"]
    assert compare("ffn=dense,moe", *common).code == 2
    assert compare("ffn=dense", *common).code == 0
    assert "killed by SIGKILL" in (tmp_path / "out" / "report.md").read_text()


def test_a_speed_is_measured_of_new_arms_alone(compare: Run, tmp_path: Path) -> None:
    fates(tmp_path, **{"speed/moe/try-2": "failed"})
    common = ["seeds=1", "budget.seconds=4", "trainer.accumulate_grad_batches=2"]
    failed = compare("ffn=dense,moe", *common)
    assert "moe seed 1" in failed.err
    assert "no luck" in (tmp_path / "out" / "report.md").read_text()
    assert content(tmp_path)["arms"] == {
        "dense": ["ffn=dense", "trainer.max_steps=200", "trainer.val_check_interval=40"]
    }
    again = compare("ffn=dense,moe", *common)
    assert "no luck" in (tmp_path / "out" / "report.md").read_text(), "not that it was not run again"
    assert again.code == 2
    fates(tmp_path)
    assert compare("ffn=dense,moe", *common, "resume=always").code == 0
    assert set(content(tmp_path)["steps_per_second"]) == {"dense", "moe"}


def test_never_waits_for_who_has_a_run_and_leaves_a_comparison(compare: Run, tmp_path: Path) -> None:
    common = ["seeds=1", "trainer.max_steps=10", "warm_up=false", "resume=never"]
    assert compare("ffn=dense", *common).code == 0
    run = tmp_path / "out" / "runs" / "dense" / "seed-1"
    with held_elsewhere(run):
        refused = compare("ffn=moe", *common)
    assert "is being run by another process" in refused.err
    assert (run / "run.json").exists()
    assert compare("ffn=moe", *common).code == 0
    assert list(content(tmp_path)["arms"]) == ["moe"]
    assert not run.exists()


@pytest.mark.parametrize(
    "said",
    [
        ["trainer.max_steps=9"],
        *([f"+variants.b={{ffn: dense, {key}: 9}}"] for key in ("trainer.max_steps", "++trainer.max_steps")),
    ],
    ids=["command", "variant", "variant, forced"],
)
def test_a_length_is_said_once(compare: Run, tmp_path: Path, said: list[str]) -> None:
    refused = compare("ffn=dense", "budget.tokens=4e3", *said)
    assert refused.code == 2
    assert "both say how long a run is" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_wrong_metric_of_the_sweep_is_refused_every_time(compare: Run, tmp_path: Path) -> None:
    command = ["ffn=dense", "seeds=1", "lr_sweep=[3e-3,6e-3]", "trainer.max_steps=10", "sweep.metric=recall_riddle"]
    for _ in range(3):
        refused = compare(*command)
        assert "sweep.metric=recall_riddle is a figure of no run" in refused.err
    assert not (tmp_path / "out" / "runs").exists()
