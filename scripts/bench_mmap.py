"""A table that stays in its file (`table.device=mmap`) and the same table in memory: decoding and plain lookups.

    python scripts/bench_mmap.py [--sizes 1 4] [--huge 40] [--rounds 5] [--folder FOLDER] [--out]

Decoding runs a Memory+ layer of dimension 1,024 (128 rows of 4 KiB per token) on new tokens in every call. `warm`: the
file's pages are in the page cache; `cold`: they are dropped from it before each round, so that rows come from the disk.
Both tables hold the same values and give the same bits, which is checked first. `readahead`: without the advice to the
system that reads are scattered. `anonymous` is memory that only swap could free: the process needs it, while the system
can drop mapped pages at any time. The huge table is a sparse file, whose unwritten rows are zeros that take no disk
space: it shows whether a mapping larger than the memory works and what it costs, not the speed of a disk.

Letters: R rows of a block.
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
from benchmarks.blocks import Block, context_of, memory_plus
from benchmarks.inputs import value_table
from benchmarks.memory import resident_memory
from benchmarks.report import conditions
from torch import Tensor, nn

from pkm_lightning.checkpoints.mapped import MappedFile, expect_scattered_reads
from pkm_lightning.checkpoints.safetensors import lay_out

DIM = 1024
GIB = 2**30
FIELDS = (
    *("what", "table_gib", "way", "state", "batch", "rounds", "tokens_s", "min", "max", "times_memory"),
    *("anonymous_mib", "status"),
)


def write_table(path: Path, rows: int, *, sparse: bool) -> int:
    """Writes a safetensors file with one table of `rows`; returns the byte at which its values start."""
    header, entries = lay_out({"tables.0.weight": ((rows, DIM), torch.float32)}, {})
    entry = entries["tables.0.weight"]
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            # Blocks that were never written take no disk space and read as zeros.
            file.truncate(entry.start + entry.n_bytes)
        else:
            for start in range(0, rows, 2**14):
                block_RV = torch.randn(min(2**14, rows - start), DIM).mul_(DIM**-0.5)
                file.write(block_RV.numpy().data)
            # The page cache drops clean pages only: what is not on the disk yet would stay warm.
            file.flush()
            os.fsync(file.fileno())
    return entry.start


class MappedTable:
    """Table in a file, whose pages can be dropped."""

    def __init__(self, path: Path, start: int, rows: int, *, readahead: bool = False) -> None:
        self.path, self.file = path, MappedFile(path)
        self.weight_NV = self.file.tensor(start, torch.float32, (rows, DIM))
        if not readahead:
            expect_scattered_reads(self.weight_NV)

    _buffer = bytearray(2**24)

    def cool(self) -> None:
        """Drops its pages from this process and from the page cache."""
        self.file.forget()
        with self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        """Reads every page: from the disk into the page cache, then into this process's page table."""
        with self.path.open("rb", buffering=0) as file:
            while file.readinto(self._buffer):
                pass
        for part_NV in self.weight_NV.split(2**14):
            part_NV[:, :: 4096 // 4].sum()


def decoder(weight_NV: Tensor, device: str) -> nn.Module:
    """Builds a Memory+ layer around the rows; every call gives equal other weights."""
    torch.manual_seed(0)
    n_keys = math.isqrt(len(weight_NV))
    layer = memory_plus(Block(1, DIM, 4 * DIM, n_keys, 512, False), weight_NV, "rows", device=device)
    return layer.eval()


def decoding_speed(layer: nn.Module, batch: int, seconds: float) -> float:
    """Decodes new tokens for about `seconds`; returns tokens per second."""
    n_tokens, elapsed = 0, 0.0
    while elapsed < seconds:
        x_B1D = torch.randn(batch, 1, DIM)
        start = time.perf_counter()
        layer(x_B1D, context_of(x_B1D))
        elapsed += time.perf_counter() - start
        n_tokens += batch
    return n_tokens / elapsed


def decode(path: Path, gib: float, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures both ways at batches of 1 and 64, interleaved."""
    # Product keys address a square number of rows.
    rows = math.isqrt(int(gib * GIB) // (4 * DIM)) ** 2
    start = write_table(path, rows, sparse=False)
    mapped, ahead = MappedTable(path, start, rows), MappedTable(path, start, rows, readahead=True)
    before = resident_memory("RssAnon")
    layer = decoder(mapped.weight_NV, "mmap")
    mapped.warm()
    decoding_speed(layer, 64, seconds)
    held = {"mmap": resident_memory("RssAnon") - before}
    before = resident_memory("RssAnon")
    copied = decoder(mapped.weight_NV.clone(), "cpu")
    decoding_speed(copied, 64, seconds)
    held["memory"] = resident_memory("RssAnon") - before
    x_B1D = torch.randn(64, 1, DIM)
    assert torch.equal(layer(x_B1D, context_of(x_B1D)).y_BTD, copied(x_B1D, context_of(x_B1D)).y_BTD)

    layers = {"memory": copied, "mmap": layer, "mmap, readahead": decoder(ahead.weight_NV, "mmap")}
    held["mmap, readahead"] = held["mmap"]

    def prepared(way: str, state: str) -> nn.Module:
        layers[way](x_B1D, context_of(x_B1D))  # loads the layer's other weights into the caches
        if state == "cold":
            mapped.cool()
            ahead.cool()
        elif way == "mmap":
            mapped.warm()
        return layers[way]

    ways = [("memory", "warm"), ("mmap", "warm"), ("mmap", "cold"), ("mmap, readahead", "cold")]
    for batch in (1, 64):
        speeds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            # Another way comes first in each round, so that none always meets the same state of the machine.
            for way in ways[number % 4 :] + ways[: number % 4]:
                speeds[way].append(decoding_speed(prepared(*way), batch, seconds))
        base = statistics.median(speeds["memory", "warm"])
        for (way, state), rates in speeds.items():
            yield row("decode", gib, way, state, batch, rates, base, held[way])


def row(
    what: str, gib: float, way: str, state: str, batch: int, rates: list[float], base: float | None, held: int
) -> dict[str, Any]:
    """Returns a line of the results."""
    median = statistics.median(rates)
    return {
        "what": what, "table_gib": f"{gib:g}", "way": way, "state": state, "batch": batch, "rounds": len(rates),
        "tokens_s": f"{median:.1f}", "min": f"{min(rates):.1f}", "max": f"{max(rates):.1f}",
        "times_memory": "" if base is None else f"{median / base:.3f}", "anonymous_mib": f"{held / 2**20:.0f}",
        "status": "ok",
    }  # fmt: skip


def huge(path: Path, gib: float, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures scattered lookups in a table larger than the memory, and whether torch's own mapping accepts it."""
    rows, batch = int(gib * GIB) // (4 * DIM), 64
    mapped = MappedTable(path, write_table(path, rows, sparse=True), rows)
    before = resident_memory("RssAnon")
    table = value_table(mapped.weight_NV, "rows", "mmap")
    held, rates = 0, []
    for _ in range(rounds):
        n_reads, elapsed = 0, 0.0
        while elapsed < seconds:
            ids_TK = torch.randint(rows, (batch, 128), dtype=torch.int32)
            weights_TK = torch.rand(batch, 128)
            start = time.perf_counter()
            table(ids_TK, weights_TK)
            elapsed, n_reads = elapsed + time.perf_counter() - start, n_reads + batch
            held = max(held, resident_memory("RssAnon") - before)
        rates.append(n_reads / elapsed)
    yield row("lookup, sparse file", gib, "mmap", "unread rows", batch, rates, None, held)
    try:
        # Torch maps files writable, so Linux counts the whole mapping as memory that may be needed.
        torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        status = "ok"
    except RuntimeError as error:
        status = " ".join(str(error).split())[:120].replace(str(path), "FILE")
    yield {"what": "torch's own private mapping", "table_gib": f"{gib:g}", "way": "from_file", "status": status}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and, with `--out`, writes scripts/results/DATE-bench-mmap.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 4], help="GiB of tables with values")
    parser.add_argument("--huge", type=float, default=40, help="GiB of the sparse table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a measurement")
    parser.add_argument("--folder", type=Path, help="for the temporary files, on the disk of interest")
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"))
    parsed = parser.parse_args(arguments)
    plans: list[tuple[Callable[..., Iterator[dict[str, Any]]], float]] = [(decode, gib) for gib in parsed.sizes]
    facts, lines = conditions(torch.device("cpu")), []
    with torch.inference_mode():
        for measure, gib in [*plans, (huge, parsed.huge)]:
            with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
                for line in measure(Path(folder) / "table.safetensors", gib, parsed.rounds, parsed.seconds):
                    print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""), flush=True)
                    lines.append(line)
    if parsed.out:
        path = parsed.out if parsed.out.suffix == ".csv" else parsed.out / f"{facts['date']}-bench-mmap.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *FIELDS])
            writer.writeheader()
            writer.writerows({**facts, **line} for line in lines)


if __name__ == "__main__":
    main()
