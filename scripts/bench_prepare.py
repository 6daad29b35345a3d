"""Megabytes of text per second that `prepare` turns into shards, its CPU seconds, and the memory that it takes.

    python scripts/bench_prepare.py [TEXT] [--megabytes 1000] [--folder FOLDER] [--out FILE.csv]

TEXT is a file or a folder of `.txt` files, repeated where there is too little. Without it the text is what programs and
documentation are installed on this machine, each file once. `prepare` is a process of its own, timed from start to end,
with a tokenizer that a run on the first 20 MB has learned. Before and after it the library alone encodes these 20 MB,
as other work on the machine slows down both. A gigabyte takes 6 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

#: Where text is installed, and the endings of its files.
PLACES = ("/usr", "/opt", sys.prefix, sys.base_prefix)
ENDINGS = (
    *(".c", ".cpp", ".css", ".go", ".h", ".hpp", ".html", ".ipynb", ".java", ".js", ".json", ".md", ".pl"),
    *(".py", ".pyi", ".rs", ".rst", ".sh", ".ts", ".txt", ".xml"),
)
#: Bytes of a file that is taken: many smaller ones are empty or licences, and larger ones often tables.
LEAST, MOST = 500, 2_000_000
#: Bytes of each file of the corpus, and text that the tokenizer learns from and the library encodes, in MB.
FILE_BYTES, SAMPLE = 4_000_000, 20
#: Characters per call of the library, and of each text in it.
CALL, CHUNK = 1_000_000, 5_000
#: Seconds between looks at the memory of a process.
LOOK = 0.1


def installed_texts(places: Sequence[str] = PLACES) -> Iterator[bytes]:
    """Yields the files of text on this machine, each content once, in an order that mixes their kinds."""
    roots = {os.path.realpath(place) for place in places}
    folders = (entry for root in sorted(roots) for entry in os.walk(root))
    files = {os.path.join(folder, name) for folder, _, names in folders for name in names if name.endswith(ENDINGS)}
    seen: set[bytes] = set()
    for file in random.Random(0).sample(sorted(files), len(files)):
        try:
            content = Path(file).read_bytes() if LEAST <= os.stat(file).st_size <= MOST else b""
            content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        # Versions of one file often differ in white space and numbers alone.
        digest = hashlib.sha256(re.sub(rb"[\s\d]+", b"", content)).digest()
        if content and digest not in seen:
            seen.add(digest)
            yield content


def repeated_texts(text: Path) -> Iterator[bytes]:
    """Yields the files of `text` again and again; they differ in their first line."""
    files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    if not any(file.stat().st_size for file in files):
        sys.exit(f"error: TEXT={text} holds no text; give a file of text, or a folder of .txt files.")
    for number, file in enumerate(cycle(files)):
        yield f"{number}\n".encode() + file.read_bytes()


def write_corpus(texts: Iterator[bytes], megabytes: float, folder: Path) -> Path:
    """Writes at least `megabytes` of text, where there are so many, into files of a new folder, and returns it."""
    folder.mkdir()
    remaining, number = int(megabytes * 1e6), 0
    while remaining > 0 and (content := first_bytes(texts, min(remaining, FILE_BYTES))):
        (folder / f"{number:05}.txt").write_bytes(content)
        remaining, number = remaining - len(content), number + 1
    return folder


def first_bytes(texts: Iterator[bytes], size: int) -> bytes:
    """Takes texts until there are `size` bytes of them, and returns them as documents of one file."""
    parts: list[bytes] = []
    while sum(map(len, parts)) < size and (content := next(texts, b"")):
        parts.append(content)
    return b"\n\n\n".join(parts)


class Usage(NamedTuple):
    """What a process took: seconds, seconds of all CPUs together, and its peak of resident memory in GB.

    `tree` is the peak of the sum over it and its children.
    """

    seconds: float
    cpu_seconds: float
    peak: float
    tree: float


def prepare(corpus: Path, out: Path, vocab_size: int, tokenizer: str) -> Usage:
    """Runs `prepare` in a process of its own; returns what it took."""
    keys = [f"data.path='{corpus}'", f"data.tokenizer='{tokenizer}'", f"data.vocab_size={vocab_size}", f"out='{out}'"]
    command = [sys.executable, "-m", "pkm_lightning", "prepare", "data=text", "data.document_separator=2", *keys]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    peak = tree = 0.0
    while True:
        # Not ru_maxrss of wait4, which counts this process too: it stands there until the other program is loaded.
        peak = memory(process.pid, "VmHWM") or peak
        tree = max(tree, sum(memory(pid, "VmRSS") for pid in [process.pid, *children(process.pid)]))
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(LOOK)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: prepare ended with {process.returncode}: {' '.join(command)}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, peak, max(tree, peak))


def memory(pid: int, name: str) -> float:
    """Returns an entry of `/proc/PID/status` in GB; 0 for a process that has ended."""
    try:
        entry = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(entry[1]) * 1024 / 1e9 if entry else 0.0


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    try:
        lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for line in lists for child in line.split()]


def library(corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """Returns the MB of text that the library alone encodes per second, and per second of a CPU."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    seconds = cpu_seconds = megabytes = 0.0
    for file in sorted(corpus.iterdir()):
        text = file.read_text(encoding="utf-8")
        calls = [text[begin : begin + CALL] for begin in range(0, len(text), CALL)]
        pieces = [[call[i : i + CHUNK] for i in range(0, len(call), CHUNK)] for call in calls]
        megabytes += len(text.encode()) / 1e6
        began, cpu_began = time.perf_counter(), time.process_time()
        for texts in pieces:
            backend.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - began
        cpu_seconds += time.process_time() - cpu_began
    return megabytes / seconds, megabytes / cpu_seconds


def measure(
    text: Path | None, megabytes: float, vocab_size: int, folder: Path, tokenizer: Path | None
) -> dict[str, object]:
    """Returns the line of one measurement."""
    from pkm_lightning.data.shards.content import part_totals
    from pkm_lightning.data.shards.mapped import read_index

    def texts() -> Iterator[bytes]:
        return installed_texts() if text is None else repeated_texts(text)

    corpus = write_corpus(texts(), megabytes, folder / "corpus")
    sample = folder / "sample"
    sample.mkdir()
    for file in sorted(corpus.iterdir())[: max(1, round(SAMPLE * 1e6 / FILE_BYTES))]:
        shutil.copy(file, sample)
    learning = None if tokenizer else prepare(sample, folder / "learned", vocab_size, "bpe")
    tokenizer = (tokenizer or folder / "learned" / "tokenizer.json").absolute()
    load = os.getloadavg()[0]
    before, cpu_before = library(sample, tokenizer)
    usage = prepare(corpus, folder / "prepared", vocab_size, str(tokenizer))
    after, cpu_after = library(sample, tokenizer)
    index = read_index(folder / "prepared")
    totals = part_totals(index).values()
    n_bytes = sum(total["bytes"] for total in totals) / 1e6
    alone, cpu_alone = (2 / (1 / one + 1 / other) for one, other in ((before, after), (cpu_before, cpu_after)))
    rate, cpu_rate = n_bytes / usage.seconds, n_bytes / usage.cpu_seconds
    return {
        "cpus": os.cpu_count(), "load": f"{load:.1f}", "text": text.name if text else "installed",
        "megabytes": f"{n_bytes:.3g}" if n_bytes < 100 else f"{n_bytes:.0f}",
        "documents": index["read"]["documents"],
        "tokens": sum(total["tokens"] for total in totals), "vocab_size": index["vocab_size"],
        "seconds": f"{usage.seconds:.0f}", "cpu_seconds": f"{usage.cpu_seconds:.0f}",
        "mb_per_second": f"{rate:.2f}", "mb_per_cpu_second": f"{cpu_rate:.2f}",
        "library_before": f"{before:.2f}", "library_after": f"{after:.2f}",
        "library_per_cpu_second": f"{cpu_alone:.2f}", "share_of_library": f"{rate / alone:.2f}",
        "cpu_share_of_library": f"{cpu_rate / cpu_alone:.2f}", "peak_gb": f"{usage.peak:.2f}",
        "learn_seconds": f"{learning.seconds:.0f}" if learning else "",
        "learn_peak_gb": f"{learning.tree:.2f}" if learning else "",
        "shards_mb": f"{sum(file.stat().st_size for file in (folder / 'prepared').iterdir()) / 1e6:.0f}",
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the line, and appends it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, in the place of one that is learned")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument(
        "--folder", type=Path, help="for the text and the shards, on a disk with room; default: temporary"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free / 1e6
    if free < 2 * arguments.megabytes:
        sys.exit(f"error: --megabytes {arguments.megabytes:g} needs twice as much on disk, and {free:.0f} are free.")
    import torch
    from benchmarks.report import conditions

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        line = conditions(torch.device("cpu")) | measure(
            arguments.text, arguments.megabytes, arguments.vocab_size, Path(folder), arguments.tokenizer
        )
    print(", ".join(f"{name}={value}" for name, value in line.items()))
    if arguments.out:
        write_line(arguments.out, line)


def write_line(path: Path, line: dict[str, object]) -> None:
    """Appends a line to a CSV file; one of other columns is begun anew beside it."""
    if path.exists() and path.read_text().partition("\n")[0] != ",".join(line):
        path = path.with_stem(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"other columns than those of --out: written to {path}")
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
