"""The rows of the benchmarks of a GPU by importance, and the process that measures them; see `bench_gpu.py`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import bench_decode
import bench_ops
import bench_token_tables
import bench_train
import torch

from benchmarks.case import Options, Row
from benchmarks.protocol import command_line, results_of, stopwatch_of
from benchmarks.report import Result, conditions, print_end, print_head, write_csv
from benchmarks.supervision import append, events

#: What is measured first; then come other directions and parts of the same, and whole layers of other packages.
IMPORTANT = (
    "R1 retrieval, forward",
    "R5 table step",
    "R2 lookup, forward",
    "R3 lookup, backward",
    "R6 block step",
    "R8 decode",
    "R7 whole model",
    "R4 optimizer step",
)
#: Sizes of important rows that come before any other row.
FIRST_SIZES = 2


def by_importance(rows: Iterable[Row]) -> list[Row]:
    """Orders rows: the first size of all important rows, the second size of them, the others, then further sizes."""
    counts: Counter[str] = Counter()
    keyed = []
    for row in rows:
        size = counts[row.name]
        counts[row.name] += 1
        is_important = row.name in IMPORTANT
        place = IMPORTANT.index(row.name) if is_important else len(IMPORTANT)
        keyed.append((size if is_important else size + FIRST_SIZES, place, row))
    return [row for *_, row in sorted(keyed, key=lambda entry: entry[:2])]


def all_rows(options: Options) -> list[Row]:
    """Returns the rows of all benchmarks, which are made when they are measured."""
    plans = (bench_ops.plan, bench_train.plan, bench_decode.plan, bench_token_tables.plan)
    return by_importance(row for plan in plans for row in plan(options))


def measure_rows(doc: str | None, records: Path | None, seconds: float, arguments: Sequence[str]) -> int:
    """Measures the rows that have not ended yet, and records each; returns the exit code.

    Args:
        doc: for the help text.
        records: see `supervise`; None with `--help` only.
        seconds: as `--seconds`.
        arguments: all other options.
    """
    options, parsed = command_line(doc, [*arguments, "--seconds", str(seconds)])
    assert records is not None
    rows = [row for row in all_rows(options) if parsed.only in row.name]
    facts = conditions(options.device) | {"clock": "CPU time" if options.cpu_time else "wall"}
    earlier = events(records, "end")
    if not events(records, "plan"):
        append(records, "plan", [row.title for row in rows])
        print_head("gpu", facts)
    results = [Result(**result) for one in earlier for result in one]
    stopwatch = stopwatch_of(options)
    for row in rows[len(earlier) :]:
        append(records, "begin", {"row": row.name, "sizes": row.sizes})
        measured = results_of(row, options, stopwatch)
        results += measured
        append(records, "end", [dataclasses.asdict(result) for result in measured])
        if parsed.out:
            write_csv(parsed.out, f"gpu-{options.device.type}", facts, results)
        if options.device.type == "cuda":
            # After an illegal access every call fails: this one ends the process, and the next goes on.
            torch.cuda.synchronize()
    has_failed = print_end(results)
    append(records, "done", True)
    return int(has_failed)
