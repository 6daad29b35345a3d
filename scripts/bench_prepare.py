"""Megabytes of text per second that `prepare` turns into shards, and the memory that it takes.

    python scripts/bench_prepare.py TEXT [--megabytes 1000] [--folder FOLDER] [--out FILE.csv]

TEXT is a file or a folder of `.txt` files, repeated until there is enough. `prepare` is a process of its own, timed
from start to end, with a tokenizer that a run on the first 40 MB has learned. Before and after it the library alone
encodes these 40 MB: other work on the machine slows down both.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarks.report import conditions
from tokenizers import Tokenizer

from pkm_lightning.data.shards.content import part_totals
from pkm_lightning.data.shards.mapped import read_index

#: Characters per call of the library, and of each text in it.
CALL, CHUNK = 1_000_000, 5_000


def repeated(text: Path, megabytes: float, folder: Path) -> Path:
    """Returns a folder with at least `megabytes` of the text, whose files differ in their first line."""
    files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    corpus = folder / "corpus"
    corpus.mkdir()
    size = number = 0
    while size < megabytes * 1e6:
        content = files[number % len(files)].read_bytes()
        (corpus / f"{number:05}.txt").write_bytes(f"{number}\n".encode() + content)
        size, number = size + len(content), number + 1
    return corpus


class Usage(NamedTuple):
    """What a process took: seconds, seconds of all CPUs together, and its peak of resident memory in GB."""

    seconds: float
    cpu_seconds: float
    peak: float


def prepare(corpus: Path, out: Path, vocab_size: int, tokenizer: str) -> Usage:
    """Runs `prepare` in a process of its own; returns what it took."""
    keys = [f"data.path={corpus}", f"data.tokenizer={tokenizer}", f"data.vocab_size={vocab_size}", f"out={out}"]
    command = [sys.executable, "-m", "pkm_lightning", "prepare", "data=text", "data.document_separator=2", *keys]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return Usage(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)


def library(corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """Returns the MB of text that the library alone encodes per second, and per second of a CPU."""
    text = "".join(file.read_text() for file in sorted(corpus.iterdir()))
    backend = Tokenizer.from_file(str(tokenizer))
    calls = [text[begin : begin + CALL] for begin in range(0, len(text), CALL)]
    began, cpu_began = time.perf_counter(), time.process_time()
    for call in calls:
        backend.encode_batch_fast([call[i : i + CHUNK] for i in range(0, len(call), CHUNK)], add_special_tokens=False)
    megabytes = len(text.encode()) / 1e6
    return megabytes / (time.perf_counter() - began), megabytes / (time.process_time() - cpu_began)


def measure(text: Path, megabytes: float, vocab_size: int, folder: Path, tokenizer: Path | None) -> dict[str, object]:
    """Returns the line of one measurement."""
    (folder / "small").mkdir()
    beginning = repeated(text, min(megabytes, 40), folder / "small")
    learning = None if tokenizer else prepare(beginning, folder / "learned", vocab_size, "bpe")
    tokenizer = tokenizer or folder / "learned" / "tokenizer.json"
    corpus = repeated(text, megabytes, folder)
    load = os.getloadavg()[0]
    (before, cpu_before) = library(beginning, tokenizer)
    usage = prepare(corpus, folder / "prepared", vocab_size, str(tokenizer))
    (after, cpu_after) = library(beginning, tokenizer)
    index = read_index(folder / "prepared")
    totals = part_totals(index).values()
    n_bytes = sum(total["bytes"] for total in totals) / 1e6
    alone, cpu_alone = (2 / (1 / one + 1 / other) for one, other in ((before, after), (cpu_before, cpu_after)))
    rate, cpu_rate = n_bytes / usage.seconds, n_bytes / usage.cpu_seconds
    return {
        "cpus": os.cpu_count(), "load": f"{load:.1f}", "megabytes": f"{n_bytes:.0f}", "files": index["read"]["files"],
        "tokens": sum(total["tokens"] for total in totals), "vocab_size": index["vocab_size"],
        "seconds": f"{usage.seconds:.0f}", "mb_per_second": f"{rate:.2f}", "mb_per_cpu_second": f"{cpu_rate:.2f}",
        "library_before": f"{before:.2f}", "library_after": f"{after:.2f}",
        "library_per_cpu_second": f"{cpu_alone:.2f}", "share_of_library": f"{rate / alone:.2f}",
        "cpu_share_of_library": f"{cpu_rate / cpu_alone:.2f}", "peak_gb": f"{usage.peak:.2f}",
        "learn_seconds": f"{learning.seconds:.0f}" if learning else "",
        "learn_peak_gb": f"{learning.peak:.2f}" if learning else "",
        "shards_mb": f"{sum(file.stat().st_size for file in (folder / 'prepared').iterdir()) / 1e6:.0f}",
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the line, and appends it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, in the place of one that is learned")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument(
        "--folder", type=Path, help="for the text and the shards, on a disk with room; default: temporary"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        line = conditions(torch.device("cpu")) | measure(
            arguments.text, arguments.megabytes, arguments.vocab_size, Path(folder), arguments.tokenizer
        )
    print(", ".join(f"{name}={value}" for name, value in line.items()))
    if arguments.out:
        is_new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line))
            if is_new:
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main()
