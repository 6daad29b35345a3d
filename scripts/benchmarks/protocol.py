"""The protocol of the benchmarks: ways of doing one thing, checked first, then timed side by side in one process.

A way that is wrong, fails or runs out of memory is reported as such and not timed. Rounds are interleaved and start
with another way each time; caches are overwritten before every measurement. GB/s are bytes that any way must move,
whatever it moves, over the median; next to them stands a copy measured in the same rounds.

A row that fails is reported, and the others go on. A benchmark of which a row or a way of this package has failed ends
with exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.case import Case, Options, Row, Run, Skipped, Way
from benchmarks.deadline import Deadline
from benchmarks.memory import peak_memory
from benchmarks.report import NOT_RUN, Result, conditions, print_case, print_end, print_head, write_csv
from benchmarks.stopwatch import Stopwatch, free_memory

#: More bytes than any cache holds.
SWEEP_BYTES = 2**28


def command_line(doc: str | None, arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """Parses the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda; chooses the sizes too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: does it run at all")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the process, where other work shares the machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--seconds", type=float, help="begin nothing after so many seconds, and name what was left out")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=Path("scripts/results"), help="write FOLDER/DATE-NAME.csv, or FILE.csv"
    )
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if device.type == "cuda" and parsed.cpu_time:
        parser.error("--cpu-time measures no kernels of a GPU; use --device cpu, or leave it out")
    rounds = 1 if parsed.smoke else parsed.rounds
    deadline = Deadline(parsed.seconds)
    return Options(device, parsed.smoke, rounds, not parsed.no_memory, parsed.cpu_time, deadline), parsed


def benchmark(
    name: str,
    doc: str | None,
    plan: Callable[[Options], Iterable[Row]],
    arguments: Sequence[str] | None,
) -> list[Result]:
    """Runs the rows of a script, prints them and, with `--out`, writes them.

    Args:
        name: names the CSV file.
        doc: the script's docstring, whose first paragraph becomes the help text.
        plan: yields the rows for the command line's options.
        arguments: the command line; None for the process's own.

    Raises:
        SystemExit: with code 1, after the last row, if one has failed.
    """
    options, parsed = command_line(doc, arguments)
    stopwatch = stopwatch_of(options)
    facts = conditions(options.device) | {"clock": "CPU time" if options.cpu_time else "wall"}
    print_head(name, facts)
    results: list[Result] = []
    for row in plan(options):
        if parsed.only not in row.name:
            continue
        results += results_of(row, options, stopwatch)
        if parsed.out:
            # After every row: a benchmark that is stopped keeps what it has measured.
            path = write_csv(parsed.out, f"{name}-{options.device.type}", facts, results)
    if parsed.out and results:
        print(f"\nwritten: {path}")
    if print_end(results):
        raise SystemExit(1)
    return results


def stopwatch_of(options: Options) -> Stopwatch:
    """Builds the clock of a benchmark."""
    return Stopwatch(options.device, 2**16 if options.smoke else SWEEP_BYTES, cpu_time=options.cpu_time)


def results_of(row: Row, options: Options, stopwatch: Stopwatch) -> list[Result]:
    """Runs and prints a row; one that cannot run is one result, with the reason as its status."""
    if options.deadline.has_passed:
        return [Result(row=row.name, sizes=row.sizes, status=NOT_RUN)]
    torch.manual_seed(0)
    started = time.perf_counter()
    try:
        results = _measured(row, options, stopwatch)
    except Exception as error:
        results = [Result(row=row.name, sizes=row.sizes, status=_reason(error))]
    if results[0].way:
        print_case(f"{row.name} ({time.perf_counter() - started:.0f} s)", results[0].sizes, results)
    else:
        print(f"\n{row.title}: {results[0].status}", flush=True)
    free_memory(options.device)
    return results


def _measured(row: Row, options: Options, stopwatch: Stopwatch) -> list[Result]:
    """Makes and measures the case of a row, which nothing refers to afterwards."""
    case = row.make()
    if isinstance(case, Skipped):
        return [Result(row=row.name, sizes=row.sizes, status=f"skipped: {case.reason}")]
    return measure(row, case, options, stopwatch)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass
class _Entry:
    way: Way
    result: Result
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)


def measure(row: Row, case: Case, options: Options, stopwatch: Stopwatch) -> list[Result]:
    """Checks, warms up and times the ways of one case, and measures their memory."""
    entries = [
        _Entry(way, Result(row=row.name, sizes=case.sizes, way=way.name, is_peer=way.name in case.peers))
        for way in case.ways
    ]
    copies = [stopwatch.copy_bandwidth()]
    for entry in entries if case.timed else ():
        _attempt(entry, options.deadline, lambda entry: _check(case, entry))
    for number in range(options.rounds if case.timed else 0):
        copies.append(stopwatch.copy_bandwidth())
        # The way that comes first in a round would otherwise always meet the same state of the machine.
        shift = number % len(entries)
        for entry in entries[shift:] + entries[:shift]:
            _attempt(entry, options.deadline, lambda entry: _time(case, entry, stopwatch))
    for entry in entries:
        if options.memory and case.memory and entry.result.status == "ok":
            _attempt(entry, options.deadline, lambda entry: _measure_memory(row, case, entry, options))
        entry.result.summarise(entry.seconds, case.moved, case.tokens, statistics.median(copies))
    results = [entry.result for entry in entries]
    for result in results:
        result.compare([other for other in results if other.way in case.baselines])
    return results


def _attempt(entry: _Entry, deadline: Deadline, step: Callable[[_Entry], None]) -> None:
    """Runs one step; a way that raises anything is out, and the others go on."""
    if entry.result.status != "ok":
        return
    if deadline.has_passed:
        # A way that was timed in some rounds keeps them.
        entry.result.status, entry.run = "ok" if entry.seconds else NOT_RUN, None
        return
    try:
        step(entry)
    except Exception as error:
        entry.result.status, entry.run = _reason(error), None
        if isinstance(error, torch.cuda.OutOfMemoryError):
            free_memory(torch.device("cuda"))


def _check(case: Case, entry: _Entry) -> None:
    run = entry.way.build()
    entry.result.error = case.error(run)
    entry.result.same_bits = _same_bits(run) if case.clock is None else None
    if not entry.result.error <= case.tolerance:
        entry.result.status = f"wrong: relative error {entry.result.error:.1e}, allowed {case.tolerance:.0e}"
    elif not case.rebuild:
        entry.run = run
    # What the check built must not count as memory of the next way.
    del run
    gc.collect()


def _same_bits(run: Run) -> bool | None:
    """Compares every 97th number of two calls; returns None where a call returns no tensors."""
    samples = []
    for _ in range(2):
        result = run()
        if result is None:
            return None
        flat = ((value._values() if value.is_sparse else value).detach().reshape(-1) for value in result)
        samples.append([value[::97].clone() for value in flat])
        del result
    return all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


def _time(case: Case, entry: _Entry, stopwatch: Stopwatch) -> None:
    run = entry.run
    if run is None:
        run = entry.way.build()
        run()  # warms up
    entry.seconds.append(case.clock(run) if case.clock else stopwatch(run, case.calls))
    if case.rebuild:
        del run
        gc.collect()


def _measure_memory(row: Row, case: Case, entry: _Entry, options: Options) -> None:
    if options.device.type == "cuda":
        entry.run = None
        free_memory(options.device)
    way, device = entry.way.name, options.device
    try:
        peak = peak_memory(case, row.make, row.make_tiny, way, device)
        half = peak_memory(None, row.make_half, row.make_tiny, way, device) if row.make_half else None
    except torch.cuda.OutOfMemoryError:
        return  # a second copy of the inputs did not fit next to the first, which is no failure of the way
    entry.result.peak_bytes = None if peak is None else peak + case.held
    if peak is not None and half is not None:
        entry.result.bytes_per_value = (peak - half + case.held / 2) / (case.values / 2)
