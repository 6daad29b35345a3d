"""Training beside a frozen table: in memory, and in its file with and without prefetch, warm and cold.

    python scripts/bench_frozen_table.py [--rows 65536] [--huge 20000000] [--steps 20] [--rounds 3] [--out]

A transformer with one Engram layer (16 rows of 160 values per token) trains on random tokens by Lightning's Trainer;
each way and round runs in a process of its own. `warm`: the file is in the page cache; `cold`: it is dropped from it
after each step, so that every row comes from the disk. The huge table is a sparse file of about 102 GB, whose unwritten
rows are zeros that take no disk space: it shows the memory of a table that is larger than it, not the speed of a disk.
`seconds` are medians of a step, the least over rounds, as other processes only ever add to them; `cpu` is the time of
all threads per step. Resident memory is that of /proc/self/status at the end: RssAnon, and RssFile with libraries.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.report import conditions

TOKENS, VOCAB = 1024, 8192
#: Name of the way, of the table (small or huge), overrides, prefetch, and whether the file is dropped from the cache.
WAYS: dict[str, tuple[str, list[str], bool, bool]] = {
    "no table": ("", ["ffn=dense", "placement=middle"], True, False),
    "memory": ("small", [], True, False),
    "file, prefetch, warm": ("small", ["table.device=mmap"], True, False),
    "file, warm": ("small", ["table.device=mmap"], False, False),
    "file, prefetch, cold": ("small", ["table.device=mmap"], True, True),
    "file, cold": ("small", ["table.device=mmap"], False, True),
    "huge file, prefetch": ("huge", ["table.device=mmap"], True, False),
}
FIELDS = ("way", "rows", "rounds", "seconds", "times_memory", "cpu", "rss_anon_mib", "rss_file_mib", "rss_of_table_mib")


def compose(way: str, rows: int, path: Path, dim: int) -> dict[str, Any]:
    """Returns the configuration of a way."""
    from hydra import compose as composed
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    size, overrides, _, _ = WAYS[way]
    common = [f"model.dim={dim}", f"model.ffn_dim={4 * dim}", "model.n_layers=4", "model.n_heads=8"]
    common += ["model.n_kv_heads=8", f"model.vocab_size={VOCAB}", "callbacks=none", "logger=none"]
    engram = ["ffn=engram", "ffn.heads=8", f"ffn.rows={rows}", "ffn.row_dim=160", "ffn.end_id=0"]
    table = ["table.trainable=false", f"table.path={path}"] if path.exists() else []
    with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        chosen = composed("config", overrides=[*common, *(engram + table if size else []), *overrides])
    return dict(OmegaConf.to_container(chosen, resolve=True))  # type: ignore[arg-type]


def write_table(path: Path, way: str, rows: int, dim: int, *, sparse: bool) -> int:
    """Writes the table of a model as a bf16 file; returns the number of its rows."""
    from pkm_lightning.build.model import build_model
    from pkm_lightning.checkpoints.safetensors import lay_out

    with torch.device("meta"):
        (table,) = build_model(compose(way, rows, path, dim)).tables
    header, entries = lay_out({"table": ((table.rows, table.dim), torch.bfloat16)}, {})  # type: ignore[dict-item]
    with path.open("wb") as file:
        file.write(header)
        if sparse:
            file.truncate(entries["table"].start + entries["table"].n_bytes)
        else:
            for start in range(0, int(table.rows), 2**16):  # type: ignore[arg-type]
                count = min(2**16, int(table.rows) - start)  # type: ignore[arg-type]
                block = torch.randn(count, int(table.dim)).bfloat16()  # type: ignore[arg-type]
                file.write(block.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())  # only clean pages can be dropped
    return int(table.rows)  # type: ignore[arg-type]


def train(way: str, rows: int, path: Path, dim: int, steps: int) -> dict[str, float]:
    """Trains in this process, and returns its figures."""
    import lightning as L
    from torch.utils.data import DataLoader

    from pkm_lightning.training import LanguageModule, lookahead

    _, _, prefetches, drops = WAYS[way]
    if not prefetches:
        lookahead.is_prefetched = lambda *_: False
    L.seed_everything(1, verbose=False)
    ids = torch.randint(VOCAB, (steps, 4, TOKENS // 4))
    batches = [{"input_ids": one, "labels": one.roll(-1, 1)} for one in ids]
    wall, cpu = [time.perf_counter()], [time.process_time()]

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if drops:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            wall.append(time.perf_counter())
            cpu.append(time.process_time())

    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1, callbacks=[Clock()],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**6,
    )  # fmt: skip
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(LanguageModule(compose(way, rows, path, dim)), loader)
    skipped = steps // 4
    seconds = [after - before for before, after in zip(wall[skipped:-1], wall[skipped + 1 :], strict=True)]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}
    return {"seconds": statistics.median(seconds), "cpu": (cpu[-1] - cpu[skipped]) / len(seconds), **memory}


def measure(parsed: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs every way in a process of its own, the rounds in turn, and returns a line per way."""
    files = {"small": (folder / "small.safetensors", parsed.rows), "huge": (folder / "huge.safetensors", parsed.huge)}
    counts = {
        size: write_table(path, "memory", rows, parsed.dim, sparse=size == "huge")
        for size, (path, rows) in files.items()
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(parsed.rounds):
        for way, (size, *_) in WAYS.items():
            path, rows = files[size or "small"]
            command = [sys.executable, __file__, "--way", way, "--rows", str(rows), "--folder", str(path)]
            command += ["--dim", str(parsed.dim), "--steps", str(parsed.steps)]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(shown.splitlines()[-1]))
    lines = []
    for way, results in found.items():
        best = {name: min(result[name] for result in results) for name in results[0]}
        lines.append({
            "way": way, "rows": counts.get(WAYS[way][0], 0), "rounds": parsed.rounds,
            "seconds": round(best["seconds"], 4), "cpu": round(best["cpu"], 4),
            "rss_anon_mib": round(best["RssAnon"]), "rss_file_mib": round(best["RssFile"]),
        })  # fmt: skip
    for line in lines:
        line["times_memory"] = round(line["seconds"] / lines[1]["seconds"], 3)
        line["rss_of_table_mib"] = sum(line[name] - lines[0][name] for name in ("rss_anon_mib", "rss_file_mib"))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, measures, prints, and writes results with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**16, help="rows per head, of 16 heads")
    parser.add_argument("--huge", type=int, default=20_000_000, help="the same for the sparse file")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the temporary files, on the disk of interest")
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one way in this process; folder is its file
    parsed = parser.parse_args(arguments)
    if parsed.way:
        print(json.dumps(train(parsed.way, parsed.rows, parsed.folder, parsed.dim, parsed.steps)))
        return
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        lines = measure(parsed, Path(folder))
    facts = conditions(torch.device("cpu"))
    for line in lines:
        print("  ".join(f"{key} {line[key]}" for key in FIELDS), flush=True)
    if parsed.out:
        path = parsed.out if parsed.out.suffix == ".csv" else parsed.out / f"{facts['date']}-bench-frozen-table.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*facts, *FIELDS])
            writer.writeheader()
            writer.writerows({**facts, **line} for line in lines)


if __name__ == "__main__":
    main()
