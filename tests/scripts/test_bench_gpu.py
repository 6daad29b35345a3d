"""The benchmark of a GPU: what comes first, what is left out when the time is over, and rows that fail."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tree import ROOT

# A process that measures four rows: it records them, and the second one ends it, or never ends.
CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks.supervision import append, events

records, seconds = Path(sys.argv[sys.argv.index("--records") + 1]), float(sys.argv[sys.argv.index("--seconds") + 1])
titles = ["R1: large", "R5", "R2", "R3"]
if not events(records, "plan"):
    append(records, "plan", titles)
for title in titles[len(events(records, "end")):]:
    append(records, "begin", {"row": title, "sizes": ""})
    if title == "R5" and sys.argv[1] == "aborts":
        os.abort()
    if title == "R5" and sys.argv[1] == "hangs":
        time.sleep(60)
    print(title, "measured", flush=True)
    append(records, "end", [{"row": title}])
append(records, "done", True)
sys.exit(any("status" in result for one in events(records, "end") for result in one))
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script, or a part of the benchmarks, as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def case_of(parts: ModuleType, clock: Clock, ways: dict[str, float]) -> Any:
    """Returns a case whose ways take that many seconds of the clock per call."""

    def build(seconds: float) -> Any:
        def run() -> tuple[torch.Tensor]:
            clock.seconds += seconds
            return (torch.ones(3),)

        return run

    return parts.Case(
        sizes="3",
        ways=[parts.Way(name, lambda seconds=seconds: build(seconds)) for name, seconds in ways.items()],
        error=lambda run: 0.0,
        tolerance=0.0,
        baselines=["peer"],
        peers=["peer"],
        memory=False,
    )


def test_the_most_important_rows_come_first(module: Any) -> None:
    options = module("benchmarks.case").Options(torch.device("cuda"), False, 5, True)
    rows = module("benchmarks.important_rows").all_rows(options)
    first = ["R1", "R5", "R2", "R3", "R6", "R8", "R7", "R4"]
    assert [row.name[:2] for row in rows[:8]] == first
    # Then a second size of each that has one.
    assert [row.name[:2] for row in rows[8:14]] == ["R1", "R5", "R2", "R3", "R6", "R8"]
    assert "N=1048576" in rows[1].title
    assert "hidden=14336" in rows[4].title
    assert {"R9 memory of a step", "R7 model in the Trainer", "R1 combine"} < {row.name for row in rows[14:]}
    assert len({id(row) for row in rows}) == len(rows)


@pytest.mark.slow
def test_nothing_begins_after_the_time_and_what_is_left_out_is_named(
    module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol, parts, clock = module("benchmarks.protocol"), module("benchmarks.case"), Clock()
    deadline = module("benchmarks.deadline").Deadline(10, clock)
    options = parts.Options(torch.device("cpu"), True, 2, False, deadline=deadline)
    stopwatch = protocol.stopwatch_of(options)
    # A way is called twice to compare its bits, then once per round.
    cases = {"whole": {"peer": 1, "auto": 1}, "cut": {"peer": 0.1, "auto": 0.5, "slow": 0.3}, "never": {"peer": 1}}
    results = []
    for name, ways in cases.items():
        row = parts.Row(name, lambda ways=ways: case_of(parts, clock, ways), lambda: None, sizes="large")
        results += protocol.results_of(row, options, stopwatch)
    left_out = "not run: out of time"
    assert [(result.row, result.way, result.rounds, result.status) for result in results] == [
        ("whole", "peer", 2, "ok"),
        ("whole", "auto", 2, "ok"),
        ("cut", "peer", 1, "ok"),
        ("cut", "auto", 1, "ok"),
        ("cut", "slow", 0, left_out),
        ("never", "", 0, left_out),
    ]
    assert not module("benchmarks.report").print_end(results)
    assert capsys.readouterr().out.endswith(f"{left_out}:\n  cut, 3, slow\n  never, large\n")


@pytest.mark.slow
def test_the_others_go_on_after_a_row_that_fails(module: Any, tmp_path: Path, capsys: Any) -> None:
    protocol, parts = module("benchmarks.protocol"), module("benchmarks.case")

    def broken() -> Any:
        raise RuntimeError("no kernel image")

    def failing_peer() -> Any:
        case = case_of(parts, Clock(), {"auto": 0.0})
        return parts.Case(**vars(case) | {"ways": [parts.Way("peer", broken), *case.ways]})

    rows = [parts.Row("R1", broken, broken, sizes="T=4"), parts.Row("R5", failing_peer, broken)]
    out = tmp_path / "gpu.csv"
    with pytest.raises(SystemExit) as end:
        protocol.benchmark("test", "", lambda _: rows, ["--device", "cpu", "--smoke", "--out", str(out)])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "R1: T=4: RuntimeError: no kernel image" in printed
    # A peer that cannot run is shown, and is no failure.
    assert printed.endswith("failed:\n  R1, T=4: RuntimeError: no kernel image\n")
    assert [line.split(",")[10:14] for line in out.read_text().splitlines()[1:]] == [
        ["R1", "T=4", "", "RuntimeError: no kernel image"],
        ["R5", "3", "peer", "RuntimeError: no kernel image"],
        ["R5", "3", "auto", "ok"],
    ]


@pytest.fixture
def supervised(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that supervises the child and returns the exit code."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts"))

    def run(behaviour: str, seconds: float) -> int:
        command = [sys.executable, "-c", CHILD, behaviour]
        code: int = module("benchmarks.supervision").supervise(command, tmp_path / "records", seconds, grace=0.0)
        return code

    return run


def test_a_row_that_ends_its_process_does_not_end_the_benchmark(
    supervised: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervised("aborts", 300) == 1
    printed = capfd.readouterr().out.split("\n")
    assert [line for line in printed if line] == [
        "R1: large measured", "R5: ended its process with signal 6", "R2 measured", "R3 measured",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_row_that_does_not_end_is_stopped(supervised: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervised("hangs", 10) == 1
    assert capfd.readouterr().out.endswith("stopped in R5: 10 s are over\n\nnot run:\n  R2\n  R3\n")
