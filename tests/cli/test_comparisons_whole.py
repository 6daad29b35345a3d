"""Whole comparisons of real runs: budgets, sweeps, the ladder, kills. They take minutes, so all are `slow`."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import assert_equal_runs, start
from small import SMALL_RUN, Run, record

from pkm_lightning.compare.run_state import run_state

pytestmark = pytest.mark.slow
SMALL = [o for o in SMALL_RUN if not o.startswith(("~", "trainer."))]
SHORT = [*SMALL, "warm_up=false", "trainer.log_every_n_steps=2", "report.resamples=100"]
#: Columns of runs.csv that depend on the machine or the time.
_TIMINGS = ("seconds_train", "tokens_per_second", "peak_memory_bytes", "started")


def rows(out: Path, *, timings: bool = True) -> list[dict[str, str]]:
    with (out / "runs.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return found if timings else [{k: v for k, v in row.items() if k not in _TIMINGS} for row in found]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=900)
    return process.returncode, out


def compare(folder: Path, *overrides: str) -> tuple[int, str]:
    return ended(start("compare", *overrides, cwd=folder))


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def test_the_same_command_twice_gives_the_same_table(tmp_path: Path) -> None:
    command = ["ffn=dense,memory_plus", "match=flops", "seeds=2", "budget.tokens=4e3", "jobs=2", *SHORT]
    for name in ("one", "two"):
        code, output = compare(tmp_path, *command, f"out={name}")
        assert code == 0, output
    assert rows(tmp_path / "one", timings=False) == rows(tmp_path / "two", timings=False)
    tokens = {float(row["tokens"]) for row in rows(tmp_path / "one")}
    steps = int(content(tmp_path / "one")["arms"]["dense"][1].removeprefix("trainer.max_steps="))
    assert all(abs(value - 4e3) <= value / steps for value in tokens)


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux only")
def test_a_forked_run_is_to_the_bit_what_fit_makes_alone(tmp_path: Path) -> None:
    """Forks two runs at a time, each of which draws numbers, and starts one of them once more."""
    code, output = compare(
        tmp_path, "ffn=dense,memory_plus", "seeds=1", "out=out", "trainer.max_steps=8", "jobs=2", *SHORT
    )
    assert code == 0, output
    assert (tmp_path / "out" / "logs" / "fork-server.log").read_text() == ""
    stored = content(tmp_path / "out")
    overrides = [*stored["base"], *stored["arms"]["memory_plus"], "seed=1", "run_dir=alone"]
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    alone = start("fit", *overrides, cwd=tmp_path, env=environment)
    assert ended(alone)[0] == 0
    forked = tmp_path / "out" / "runs" / "memory_plus" / "seed-1"
    assert_equal_runs(forked, tmp_path / "alone")
    assert (forked / "recall.csv").read_text() == (tmp_path / "alone" / "recall.csv").read_text()
    records = [record(folder) for folder in (forked, tmp_path / "alone")]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["threads"] == records[1]["threads"]


def test_every_variant_is_swept_alike_and_trained_with_its_best_rate(tmp_path: Path) -> None:
    code, output = compare(
        tmp_path, "ffn=dense,pkm", "seeds=1", "lr_sweep=[1e-4,1e-2]", "out=out", "jobs=2", "trainer.max_steps=30",
        "trainer.val_check_interval=10", "dense_ladder=true", "match=flops", *SHORT,
    )  # fmt: skip
    assert code == 0, output
    sweep = content(tmp_path / "out")["sweep"]
    variants = ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x", "dense_8x", "pkm"]
    assert list(sweep["results"]) == variants
    for variant in variants:
        losses = {
            rate: record(tmp_path / f"out/sweep/{variant}/lr-{rate}/seed-1001")["objective"]["value"]
            for rate in ("0.0001", "0.01")
        }
        assert sweep["results"][variant] == losses
        assert sweep["chosen"][variant] == float(min(losses, key=lambda rate: losses[rate]))
    assert {row["arm"]: float(row["lr"]) for row in rows(tmp_path / "out")} == sweep["chosen"]
    data = {record(folder.parent)["data"] for folder in (tmp_path / "out").rglob("run.json")}
    assert len(data) == 2
    flops = {row["arm"]: float(row["trunk_flops_forward"]) for row in rows(tmp_path / "out")}
    for variant, factor in (("dense_0.5x", 0.5), ("dense_2x", 2), ("dense_8x", 8), ("pkm", 1)):
        assert abs(flops[variant] / flops["dense_1x"] / factor - 1) < 0.02
    assert "multiplier" in (tmp_path / "out" / "report.md").read_text()


def test_a_variant_without_a_working_rate_fails_alone(tmp_path: Path) -> None:
    code, _ = compare(
        tmp_path, "ffn=dense", "seeds=1", "lr_sweep=[1e-3,2e-3]", "out=out", "trainer.max_steps=4", "jobs=2", *SHORT,
        "+variants.nan={ffn: dense, optim.weight_decay: 1e30, optim.clip_norm: null}",
    )  # fmt: skip
    assert code == 2
    assert {row["arm"]: row["status"] for row in rows(tmp_path / "out")} == {"dense": "finished", "nan": "failed"}
    assert "no learning rate of the sweep" in (tmp_path / "out" / "report.md").read_text()


def test_more_variants_and_seeds_join_and_never_starts_afresh(tmp_path: Path) -> None:
    common = ["lr_sweep=[1e-3,2e-3]", "out=out", "trainer.max_steps=4", "jobs=2", *SHORT]
    for command in (["ffn=dense", "seeds=2"], ["ffn=dense,pkm", "seeds=1"]):
        code, output = compare(tmp_path, *command, *common)
        assert code == 0, output
    assert content(tmp_path / "out")["command"][4] == "ffn=dense,pkm"
    assert set(content(tmp_path / "out")["sweep"]["chosen"]) == {"dense", "pkm"}
    assert len(rows(tmp_path / "out")) == 3
    assert "differ in more than" not in (tmp_path / "out" / "report.html").read_text()
    code, output = compare(tmp_path, "ffn=pkm", "seeds=1", "resume=never", *common)
    assert code == 0, output
    assert [(row["arm"], row["seed"]) for row in rows(tmp_path / "out")] == [("pkm", "1")]


def test_a_signal_while_the_report_is_written_stops_too(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("pkm_lightning.cli.comparison_director.write_report", interrupted)
    monkeypatch.setattr("pkm_lightning.cli.comparison_director._FIRST_REPORT", 0.0)
    shown = cli("compare", "ffn=dense", "seeds=2", "out=out", "trainer.max_steps=4", *SHORT)
    assert shown.code == 130
    assert "seed 2: started" not in shown.out
    assert run_state(tmp_path / "out/runs/dense/seed-1") == "finished"


def test_a_comparison_stopped_while_speeds_are_measured_goes_on(tmp_path: Path) -> None:
    command = ["ffn=dense", "seeds=1", "budget.seconds=3", "out=out", *SHORT]
    process = start("compare", *command, cwd=tmp_path)
    _wait_until(lambda: (tmp_path / "out/speed/dense/try-1/run.json").exists(), process)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process)[0] == 143
    code, output = compare(tmp_path, *command)
    assert code == 0, output


def test_equal_seconds_become_steps_of_each_variants_own_speed(tmp_path: Path) -> None:
    command = ["ffn=dense,peer", "seeds=1", "budget.seconds=8", "out=out", *SHORT]
    code, output = compare(tmp_path, *command)
    assert code == 0, output
    found = content(tmp_path / "out")
    speeds = found["steps_per_second"]
    for row in rows(tmp_path / "out"):
        (steps,) = [o for o in found["arms"][row["arm"]] if o.startswith("trainer.max_steps=")]
        assert int(steps.partition("=")[2]) == round(8 * speeds[row["arm"]])
    assert "equal seconds" in (tmp_path / "out" / "report.md").read_text()
    before = (tmp_path / "out" / "compare.json").read_text()
    assert compare(tmp_path, *command)[0] == 0
    assert json.loads(before)["arms"] == content(tmp_path / "out")["arms"]


def _children(process: Any) -> dict[str, psutil.Process]:
    """The running fits of a comparison, by variant."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            (folder,) = [a for a in child.cmdline() if a.startswith("run_dir=")] or [""]
        except psutil.Error:
            continue
        if folder:
            found[Path(folder.strip("'")).parent.name] = child
    return found


def _wait_until(condition: Any, process: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = ["ffn=dense,memory_plus", "seeds=1", "out=out", "jobs=2", "trainer.max_steps=400",
        "trainer.val_check_interval=100", *SHORT]  # fmt: skip


def _steps(folder: Path) -> int:
    found = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def test_a_killed_run_affects_no_other_and_is_continued(tmp_path: Path) -> None:
    process = start("compare", *LONG, cwd=tmp_path)
    victim = tmp_path / "out/runs/memory_plus/seed-1"
    _wait_until(lambda: _steps(victim) > 20, process)
    _children(process)["memory_plus"].send_signal(signal.SIGKILL)
    code, output = ended(process)
    assert code == 2
    assert "killed by SIGKILL" in output
    assert {row["arm"]: row["status"] for row in rows(tmp_path / "out")} == {
        "dense": "finished",
        "memory_plus": "interrupted",
    }
    assert "killed by SIGKILL" in (tmp_path / "out/report.md").read_text()
    code, output = compare(tmp_path, *LONG)
    assert code == 0, output
    assert "dense seed 1: started" not in output
    assert {row["status"] for row in rows(tmp_path / "out")} == {"finished"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_comparison_goes_on_to_the_same_result(tmp_path: Path, number: signal.Signals) -> None:
    code, output = compare(tmp_path, *LONG[:2], "out=whole", *LONG[3:])
    assert code == 0, output
    process = start("compare", *LONG, cwd=tmp_path)
    folders = [tmp_path / f"out/runs/{variant}/seed-1" for variant in ("dense", "memory_plus")]
    _wait_until(lambda: all(_steps(folder) > 20 for folder in folders), process)
    children = [child.pid for child in _children(process).values()]
    assert len(children) == 2
    os.kill(process.pid, number)
    code, _ = ended(process)
    assert code in (128 + number, -number)
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in children):
        assert time.monotonic() < deadline, "a run outlived the comparison"
        time.sleep(0.1)
    assert {run_state(folder) for folder in folders} == {"interrupted"}
    code, output = compare(tmp_path, *LONG)
    assert code == 0, output
    assert rows(tmp_path / "out", timings=False) == rows(tmp_path / "whole", timings=False)


def test_another_comparison_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    code, output = compare(tmp_path, "ffn=dense", "seeds=1", "out=out", "trainer.max_steps=4", *SHORT)
    assert code == 0, output
    code, output = compare(tmp_path, "ffn=dense", "seeds=1", "out=out", "trainer.max_steps=6", *SHORT)
    assert code == 2
    assert "holds another comparison (trainer.max_steps=" in output
    code, output = compare(tmp_path, "ffn=dense,moe", "seeds=2", "out=out", "trainer.max_steps=4", *SHORT)
    assert code == 0, output
    assert len(rows(tmp_path / "out")) == 4
