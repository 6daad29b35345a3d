"""The results of a benchmark, printed and written as one line per way, with the conditions of the measurement."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from pkm_lightning.training.machine import cpu_name

#: Status of what the time did not suffice for.
NOT_RUN = "not run: out of time"
#: Beginnings of a status that is no failure.
_NO_FAILURE = ("ok", "skipped: ", NOT_RUN, "out of memory")


@dataclass
class Result:
    """Result of one way at one size; `status` is `ok` or the reason why there is no measurement."""

    row: str
    sizes: str = ""
    way: str = ""
    status: str = "ok"
    #: Relative error against float64.
    error: float | None = None
    #: Whether two calls agreed bitwise.
    same_bits: bool | None = None
    rounds: int = 0
    #: Seconds.
    median: float | None = None
    least: float | None = None
    p20: float | None = None
    p80: float | None = None
    bandwidth: float | None = None
    #: Bandwidth of a copy, measured in the same rounds.
    copy_bandwidth: float | None = None
    seconds_per_token: float | None = None
    peak_bytes: int | None = None
    #: Bytes at the peak per value of the table.
    bytes_per_value: float | None = None
    #: By baseline: how many times faster, and how many times fewer bytes per value.
    faster: dict[str, float] = field(default_factory=dict)
    leaner: dict[str, float] = field(default_factory=dict)
    #: Whether the way is not this package's.
    is_peer: bool = False

    @property
    def has_failed(self) -> bool:
        """Whether a row, or a way of this package, raised an error or is wrong."""
        return not self.is_peer and not self.status.startswith(_NO_FAILURE)

    def summarise(self, seconds: list[float], moved: float, tokens: int, copy_bandwidth: float) -> None:
        """Computes quantiles of the rounds, if none of them failed.

        Args:
            seconds: one measurement per round.
            moved: bytes per call that any way must move; 0 leaves bandwidth out.
            tokens: tokens per call; 0 leaves the time per token out.
            copy_bandwidth: bytes per second of a copy.
        """
        if self.status != "ok" or not seconds:
            return
        cuts = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
        self.rounds, self.median, self.least = len(seconds), statistics.median(seconds), min(seconds)
        self.p20, self.p80 = cuts[0], cuts[3]
        self.copy_bandwidth = copy_bandwidth
        self.bandwidth = moved / self.median if moved else None
        self.seconds_per_token = self.median / tokens if tokens else None

    def compare(self, baselines: list[Result]) -> None:
        """Computes `faster` and `leaner`."""
        for other in baselines:
            if self.median and other.median:
                self.faster[other.way] = other.median / self.median
            if self.bytes_per_value and other.bytes_per_value:
                self.leaner[other.way] = other.bytes_per_value / self.bytes_per_value


def conditions(device: torch.device) -> dict[str, str]:
    """Returns date, commit, machine and versions of a benchmark."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def print_head(name: str, facts: Mapping[str, str]) -> None:
    """Prints the conditions as one line."""
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items() if value), flush=True)


def print_case(row: str, sizes: str, results: list[Result]) -> None:
    """Prints a table with the columns that are not empty; times in milliseconds."""
    baselines = list(dict.fromkeys(name for result in results for name in (*result.faster, *result.leaner)))
    lines = [_cells(result, baselines) for result in results]
    shown = [name for name in lines[0] if any(line[name] for line in lines)]
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in shown}
    print(f"\n{row}: {sizes}")
    print("  ".join(name.ljust(widths[name]) if name == "way" else name.rjust(widths[name]) for name in shown))
    for line in lines:
        cells = (
            line[name].ljust(widths[name]) if name in ("way", "note") else line[name].rjust(widths[name])
            for name in shown
        )
        print("  ".join(cells).rstrip(), flush=True)


def print_end(results: list[Result]) -> bool:
    """Prints what was not run and what has failed; returns whether anything has failed."""
    left_out = list(dict.fromkeys(_title(result) for result in results if result.status == NOT_RUN))
    failed = [result for result in results if result.has_failed]
    if left_out:
        print(f"\n{NOT_RUN}:", *left_out, sep="\n  ", flush=True)
    if failed:
        print("\nfailed:", *(f"{_title(result)}: {result.status}" for result in failed), sep="\n  ", flush=True)
    return bool(failed)


def _title(result: Result) -> str:
    return ", ".join(part for part in (result.row, result.sizes, result.way) if part)


def _cells(result: Result, baselines: list[str]) -> dict[str, str]:
    def shown(value: float | None, factor: float, digits: int = 2) -> str:
        return "" if value is None else f"{value * factor:,.{digits}f}"

    notes = [] if result.status == "ok" else [result.status]
    if result.same_bits is False:
        notes.append("two calls differ in bits")
    rate, copied = result.bandwidth, result.copy_bandwidth
    return {
        "way": result.way,
        "median ms": shown(result.median, 1e3),
        "min": shown(result.least, 1e3),
        "p20": shown(result.p20, 1e3),
        "p80": shown(result.p80, 1e3),
        "GB/s": shown(rate, 1e-9, 1),
        "% of copy": shown(rate / copied if rate and copied else None, 100, 0),
        "us per token": shown(result.seconds_per_token, 1e6, 1),
        "peak MiB": shown(result.peak_bytes, 2**-20, 0),
        **{f"x {name}": shown(result.faster.get(name), 1) for name in baselines},
        "B per value": shown(result.bytes_per_value, 1),
        **{f"x less than {name}": shown(result.leaner.get(name), 1) for name in baselines},
        "note": "; ".join(notes),
    }


def write_csv(out: Path, name: str, facts: Mapping[str, str], results: list[Result]) -> Path:
    """Writes one line per way into the file `out`, or into DATE-NAME.csv if `out` is a folder; replaces the file.

    Returns:
        The file.
    """
    path = out if out.suffix == ".csv" else out / f"{facts['date']}-{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written anew after every row: a process that is killed here must not lose the rows before.
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *_record(Result(row=""))])
        writer.writeheader()
        writer.writerows({**facts, **_record(result)} for result in results)
    unfinished.replace(path)
    return path


def _record(result: Result) -> dict[str, str]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rate, copied = result.bandwidth, result.copy_bandwidth
    return {
        # The columns keep the names that earlier results have.
        "row": result.row,
        "sizes": result.sizes,
        "way": result.way,
        "status": result.status,
        "error": text(result.error, ".2e"),
        "same_bits": "" if result.same_bits is None else str(result.same_bits),
        "rounds": str(result.rounds),
        "median_s": text(result.median, ".3e"),
        "min_s": text(result.least, ".3e"),
        "p20_s": text(result.p20, ".3e"),
        "p80_s": text(result.p80, ".3e"),
        "GBps": text(rate and rate / 1e9, ".2f"),
        "copy_GBps": text(copied and copied / 1e9, ".2f"),
        "token_s": text(result.seconds_per_token, ".3e"),
        "peak_bytes": text(result.peak_bytes, "d"),
        "bytes_a_value": text(result.bytes_per_value, ".2f"),
        "times_faster_than": _ratios(result.faster),
        "times_fewer_bytes_than": _ratios(result.leaner),
    }


def _ratios(by_baseline: Mapping[str, float]) -> str:
    return "; ".join(f"{name}: {ratio:.3f}" for name, ratio in by_baseline.items())
