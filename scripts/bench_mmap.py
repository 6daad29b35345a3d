"""A table that stays in its file (`table.device=mmap`) against the same table in memory: decoding and bare lookups.

    python scripts/bench_mmap.py [--sizes 1 4] [--huge 40] [--rounds 5] [--folder FOLDER] [--out]

Decoding is a Memory+ layer of dim 1,024 (128 rows of 4 KiB a token); every call has other tokens. `warm`: the file's
pages are in the page cache; `cold`: they are dropped from it before each round, so that rows come from the disk. Both
tables hold the same values and answer the same bits, checked first. `readahead`: without the advice that rows are read
here and there. `anonymous` is memory that only swap could free:
what the process needs, where mapped pages are only lent. The huge table is a sparse file, whose unwritten rows are
zeros that cost no disk: it says whether a mapping beyond the memory works and what it takes, not how fast a disk is.

Letters: B sequences (one token each), N rows, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_blocks import Block, context_of, memory_plus
from benchmark_inputs import value_table
from benchmark_report import conditions
from torch import Tensor, nn

from pkm_lightning.checkpoints.mapped import MappedFile, expect_scattered_reads
from pkm_lightning.checkpoints.safetensors import lay_out

DIM = 1024
GIB = 2**30
FIELDS = (
    *("what", "table_gib", "way", "state", "batch", "rounds", "tokens_s", "min", "max", "times_memory"),
    *("anonymous_mib", "status"),
)


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def write_table(path: Path, rows: int, *, sparse: bool) -> int:
    """A safetensors file with one table of `rows`; returns the byte at which its values start."""
    header, entries = lay_out({"tables.0.weight": ((rows, DIM), torch.float32)}, {})
    entry = entries["tables.0.weight"]
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(entry.start + entry.n_bytes)
        else:
            for start in range(0, rows, 2**14):
                block_RD = torch.randn(min(2**14, rows - start), DIM).mul_(DIM**-0.5)
                file.write(block_RD.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    return entry.start


class MappedTable:
    """A table in a file, whose pages can be dropped."""

    def __init__(self, path: Path, start: int, rows: int, *, readahead: bool = False) -> None:
        self.path, self.file = path, MappedFile(path)
        self.weight_ND = self.file.tensor(start, torch.float32, (rows, DIM))
        if not readahead:
            expect_scattered_reads(self.weight_ND)

    _buffer = bytearray(2**24)

    def cool(self) -> None:
        """Takes its pages out of this process and out of the page cache."""
        self.file.forget()
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        """Reads every page, first in order."""
        with self.path.open("rb", buffering=0) as file:
            while file.readinto(self._buffer):
                pass
        for part_ND in self.weight_ND.split(2**14):
            part_ND[:, :: 4096 // 4].sum()


def decoder(weight_ND: Tensor, device: str) -> nn.Module:
    """A Memory+ layer around the rows; the same other weights for every call."""
    torch.manual_seed(0)
    n_keys = math.isqrt(len(weight_ND))
    layer = memory_plus(Block(1, DIM, 4 * DIM, n_keys, 512, False), weight_ND, "rows", device=device)
    return layer.eval()


def tokens_a_second(layer: nn.Module, batch: int, seconds: float) -> float:
    """Of decoding for about `seconds`, new tokens in every call."""
    done, spent = 0, 0.0
    while spent < seconds:
        x_B1D = torch.randn(batch, 1, DIM)
        began = time.perf_counter()
        layer(x_B1D, context_of(x_B1D))
        spent += time.perf_counter() - began
        done += batch
    return done / spent


def decode(path: Path, gib: float, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Both ways at batches of 1 and 64, interleaved."""
    rows = math.isqrt(int(gib * GIB) // (4 * DIM)) ** 2
    start = write_table(path, rows, sparse=False)
    mapped, ahead = MappedTable(path, start, rows), MappedTable(path, start, rows, readahead=True)
    before = anonymous()
    layer = decoder(mapped.weight_ND, "mmap")
    mapped.warm()
    tokens_a_second(layer, 64, seconds)
    held = {"mmap": anonymous() - before}
    before = anonymous()
    copied = decoder(mapped.weight_ND.clone(), "cpu")
    tokens_a_second(copied, 64, seconds)
    held["memory"] = anonymous() - before
    x_B1D = torch.randn(64, 1, DIM)
    assert torch.equal(layer(x_B1D, context_of(x_B1D)).y_BTD, copied(x_B1D, context_of(x_B1D)).y_BTD)

    layers = {"memory": copied, "mmap": layer, "mmap, readahead": decoder(ahead.weight_ND, "mmap")}
    held["mmap, readahead"] = held["mmap"]

    def prepared(way: str, state: str) -> nn.Module:
        layers[way](x_B1D, context_of(x_B1D))  # the layer's other weights, into the caches
        if state == "cold":
            mapped.cool()
            ahead.cool()
        elif way == "mmap":
            mapped.warm()
        return layers[way]

    ways = [("memory", "warm"), ("mmap", "warm"), ("mmap", "cold"), ("mmap, readahead", "cold")]
    for batch in (1, 64):
        found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways[number % 4 :] + ways[: number % 4]:
                found[way].append(tokens_a_second(prepared(*way), batch, seconds))
        base = statistics.median(found["memory", "warm"])
        for (way, state), rates in found.items():
            yield row("decode", gib, way, state, batch, rates, base, held[way])


def row(
    what: str, gib: float, way: str, state: str, batch: int, rates: list[float], base: float | None, held: int
) -> dict[str, Any]:
    """A line of the results."""
    median = statistics.median(rates)
    return {
        "what": what, "table_gib": f"{gib:g}", "way": way, "state": state, "batch": batch, "rounds": len(rates),
        "tokens_s": f"{median:.1f}", "min": f"{min(rates):.1f}", "max": f"{max(rates):.1f}",
        "times_memory": "" if base is None else f"{median / base:.3f}", "anonymous_mib": f"{held / 2**20:.0f}",
        "status": "ok",
    }  # fmt: skip


def huge(path: Path, gib: float, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Lookups all over a table beyond the memory, and what torch's own mapping says to it."""
    rows, batch = int(gib * GIB) // (4 * DIM), 64
    mapped = MappedTable(path, write_table(path, rows, sparse=True), rows)
    before = anonymous()
    table = value_table(mapped.weight_ND, "rows", "mmap")
    held, rates = 0, []
    for _ in range(rounds):
        done, spent = 0, 0.0
        while spent < seconds:
            ids_TK = torch.randint(rows, (batch, 128), dtype=torch.int32)
            weights_TK = torch.rand(batch, 128)
            began = time.perf_counter()
            table(ids_TK, weights_TK)
            spent, done = spent + time.perf_counter() - began, done + batch
            held = max(held, anonymous() - before)
        rates.append(done / spent)
    yield row("lookup, sparse file", gib, "mmap", "unread rows", batch, rates, None, held)
    try:
        torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        status = "ok"
    except RuntimeError as error:
        status = " ".join(str(error).split())[:120].replace(str(path), "FILE")
    yield {"what": "torch's own private mapping", "table_gib": f"{gib:g}", "way": "from_file", "status": status}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and, if asked for, writes scripts/results/DATE-bench-mmap.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 4], help="GiB of tables with values")
    parser.add_argument("--huge", type=float, default=40, help="GiB of the sparse table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement")
    parser.add_argument("--folder", type=Path, help="for the temporary files, on the disk of interest")
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"))
    parsed = parser.parse_args(arguments)
    plans: list[tuple[Callable[..., Iterator[dict[str, Any]]], float]] = [(decode, gib) for gib in parsed.sizes]
    facts, found = conditions(torch.device("cpu")), []
    with torch.inference_mode():
        for measure, gib in [*plans, (huge, parsed.huge)]:
            with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
                for line in measure(Path(folder) / "table.safetensors", gib, parsed.rounds, parsed.seconds):
                    print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""), flush=True)
                    found.append(line)
    if parsed.out:
        path = parsed.out if parsed.out.suffix == ".csv" else parsed.out / f"{facts['date']}-bench-mmap.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *FIELDS])
            writer.writeheader()
            writer.writerows({**facts, **line} for line in found)


if __name__ == "__main__":
    main()
