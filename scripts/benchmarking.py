"""The protocol of the benchmarks: ways of doing one thing, checked first, then timed side by side in one process.

Every way is compared with a float64 computation before it is timed; one that is wrong, fails or runs out of memory is
reported as such. Rounds are interleaved and start with another way each time; caches are swept before every
measurement. Peak memory is that of a way alone: on a GPU the allocator's, on the CPU the resident memory of a process
of its own. GB/s are bytes that any way must move, whatever it moves, over the median; beside
them stands a copy measured in the same rounds. Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_report import Result, conditions, print_case, print_head, write_csv
from torch import Tensor

Run = Callable[[], Any]
#: More than any cache holds.
SWEEP_BYTES = 2**28


class Way(NamedTuple):
    """One contender: `build` makes everything that is not timed and returns what is."""

    name: str
    build: Callable[[], Run]


@dataclass(kw_only=True)
class Case:
    """What is done, at one size.

    Args:
        sizes: at which sizes.
        ways: who does it.
        error: relative error of what a way built against float64; it runs it.
        tolerance: a larger error disqualifies.
        baselines: ways whose medians the others' are compared with.
        moved: bytes that any way must move, 0 where that says little.
        tokens: of one call, for time a token.
        calls: calls a measurement, for short ones.
        rebuild: build a way anew in each round, where all of them do not fit into memory together.
        clock: measures a call itself and returns seconds; None: wall clock, or CUDA events.
        memory: whether peak memory is of interest.
        timed: whether time is of interest; if not, nothing is checked either.
        held: bytes of the inputs that count as the way's own in peak memory.
        values: of the table, for bytes a value.
    """

    sizes: str
    ways: list[Way]
    error: Callable[[Any], float]
    tolerance: float
    baselines: Sequence[str] = ()
    moved: float = 0.0
    tokens: int = 0
    calls: int = 1
    rebuild: bool = False
    clock: Callable[[Run], float] | None = None
    memory: bool = True
    timed: bool = True
    held: int = 0
    values: int = 0


class Skipped(NamedTuple):
    """In the place of a case that cannot run here."""

    reason: str


#: Makes a case with all its inputs; of the top level of a module, so that another process can make it too.
Factory = Callable[[], Case | Skipped]


class Row(NamedTuple):
    """A line of a plan: what is done, and what makes the case, a tiny one of the same ways, and one of half the table,
    from which the bytes follow that a value costs."""

    name: str
    make: Factory
    make_tiny: Factory
    make_half: Factory | None = None


class Options(NamedTuple):
    """What the command line says."""

    device: torch.device
    smoke: bool
    rounds: int
    memory: bool


def command_line(doc: str | None, arguments: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda; chooses the sizes too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: does it run at all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=Path("scripts/results"), help="write FOLDER/DATE-NAME.csv, or FILE.csv"
    )
    parsed = parser.parse_args(arguments)
    device = torch.device(parsed.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    rounds = 1 if parsed.smoke else parsed.rounds
    return Options(device, parsed.smoke, rounds, not parsed.no_memory), parsed


def benchmark(
    name: str,
    doc: str | None,
    plan: Callable[[Options], Iterable[Row]],
    arguments: Sequence[str] | None,
) -> list[Result]:
    """Runs, prints and, if asked for, writes the rows of a script."""
    options, parsed = command_line(doc, arguments)
    stopwatch = Stopwatch(options.device, 2**16 if options.smoke else SWEEP_BYTES)
    facts = conditions(options.device)
    print_head(name, facts)
    results: list[Result] = []
    for row in plan(options):
        if parsed.only not in row.name:
            continue
        torch.manual_seed(0)
        case = row.make()
        if isinstance(case, Skipped):
            print(f"\n{row.name}: skipped: {case.reason}", flush=True)
            results.append(Result(row=row.name, status=f"skipped: {case.reason}"))
            continue
        started = time.perf_counter()
        found = measure(row, case, options, stopwatch)
        print_case(f"{row.name} ({time.perf_counter() - started:.0f} s)", case.sizes, found)
        results += found
        del case
        free(options.device)
    if parsed.out:
        write_csv(parsed.out, f"{name}-{options.device.type}", facts, results)
    return results


@dataclass
class _Entry:
    way: Way
    result: Result
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)


def measure(row: Row, case: Case, options: Options, stopwatch: Stopwatch) -> list[Result]:
    """Checks, warms up, times and weighs the ways of one case."""
    entries = [_Entry(way, Result(row=row.name, sizes=case.sizes, way=way.name)) for way in case.ways]
    copies = [stopwatch.copy_bandwidth()]
    for entry in entries if case.timed else ():
        _attempt(entry, lambda entry: _check(case, entry))
    for number in range(options.rounds if case.timed else 0):
        copies.append(stopwatch.copy_bandwidth())
        shift = number % len(entries)
        for entry in entries[shift:] + entries[:shift]:
            _attempt(entry, lambda entry: _time(case, entry, stopwatch))
    for entry in entries:
        if options.memory and case.memory and entry.result.status == "ok":
            _attempt(entry, lambda entry: _weigh(row, case, entry, options))
        entry.result.summarise(entry.seconds, case.moved, case.tokens, statistics.median(copies))
    results = [entry.result for entry in entries]
    for result in results:
        result.compare([other for other in results if other.way in case.baselines])
    return results


def _attempt(entry: _Entry, step: Callable[[_Entry], None]) -> None:
    """A way that fails is out, whatever it raises: the others go on."""
    if entry.result.status != "ok":
        return
    try:
        step(entry)
    except torch.cuda.OutOfMemoryError:
        entry.result.status, entry.run = "out of memory", None
        free(torch.device("cuda"))
    except Exception as error:
        message = " ".join(str(error).split())
        entry.result.status, entry.run = f"{type(error).__name__}: {message[:200]}", None


def _check(case: Case, entry: _Entry) -> None:
    run = entry.way.build()
    entry.result.error = case.error(run)
    entry.result.same_bits = _same_bits(run) if case.clock is None else None
    if not entry.result.error <= case.tolerance:
        entry.result.status = f"wrong: relative error {entry.result.error:.1e}, allowed {case.tolerance:.0e}"
    elif not case.rebuild:
        entry.run = run
    del run
    gc.collect()


def _same_bits(run: Run) -> bool | None:
    """Whether two calls return the same, by every 97th number; None where a call returns no tensors."""
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
        run()
    entry.seconds.append(case.clock(run) if case.clock else stopwatch(run, case.calls))
    if case.rebuild:
        del run
        gc.collect()


def _weigh(row: Row, case: Case, entry: _Entry, options: Options) -> None:
    if options.device.type == "cuda":
        entry.run = None
        free(options.device)
    try:
        peak = _peak(case, row.make, row.make_tiny, entry.way.name, options.device)
        half = _peak(None, row.make_half, row.make_tiny, entry.way.name, options.device) if row.make_half else None
    except torch.cuda.OutOfMemoryError:
        return  # a second set of its own beside all others is no failure of the way
    entry.result.peak_bytes = None if peak is None else peak + case.held
    if peak is not None and half is not None:
        entry.result.bytes_a_value = (peak - half + case.held / 2) / (case.values / 2)


def _peak(case: Case | None, make: Factory, make_tiny: Factory, way: str, device: torch.device) -> int | None:
    """Peak bytes of a way above the inputs of its case; None where the system does not tell."""
    if device.type == "cuda":
        return _peak_on_the_gpu(case or make(), way)
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Processes are forked from one that has imported everything and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "numba", "torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, make, make_tiny, way, torch.get_num_threads()).result()


def _run_twice(case: Case | Skipped, way: str, start: Callable[[], None]) -> None:
    assert isinstance(case, Case)
    build = next(one.build for one in case.ways if one.name == way)
    gc.collect()
    start()
    run = build()
    for _ in range(2):
        run()


def _peak_on_the_gpu(case: Case | Skipped, way: str) -> int:
    before: list[int] = []

    def start() -> None:
        torch.cuda.reset_peak_memory_stats()
        before.append(torch.cuda.memory_allocated())

    _run_twice(case, way, start)
    return torch.cuda.max_memory_allocated() - before[0]


def _peak_here(make: Factory, make_tiny: Factory, way: str, threads: int) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _run_twice(make_tiny(), way, lambda: None)  # loads code, which is no memory of the way
    before: list[int] = []

    def start() -> None:
        before.append(_resident("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    _run_twice(make(), way, start)
    return _resident("VmHWM") - before[0]


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def free(device: torch.device) -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Stopwatch:
    """Seconds of a call, with caches that hold none of its inputs."""

    def __init__(self, device: torch.device, sweep_bytes: int) -> None:
        self.cuda = device.type == "cuda"
        self._sweep = torch.zeros(sweep_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Run, calls: int = 1) -> float:
        """Mean over `calls`; what a call returns is freed after its time was taken."""
        total = 0.0
        for _ in range(calls):
            self._sweep.add_(1)
            total += self._event_seconds(run) if self.cuda else self._wall_seconds(run)
        return total / calls

    @staticmethod
    def _wall_seconds(run: Run) -> float:
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        del result
        return seconds

    @staticmethod
    def _event_seconds(run: Run) -> float:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        result = run()
        ended.record()
        ended.synchronize()
        del result
        return started.elapsed_time(ended) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy of half the swept memory into the other half, read and written."""
        source, target = self._sweep.chunk(2)
        return 2 * len(source) / self(lambda: target.copy_(source))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |found - expected| / |expected| (L2 norms) over the tensors; infinite where something is not finite.

    A norm, because top-k and ids that differ in one near tie are no error; wrong rows or weights are.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.double()
        error = ((ours.detach().double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst
