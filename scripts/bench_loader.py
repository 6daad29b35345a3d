"""Tokens per second that the loader gives, beside those that the tiny model trains on, in interleaved rounds.

The corpus is made up: shards of random tokens in documents of random lengths, which a page cache holds. Every loader
gives batches of the same shape, by packing and by number of worker processes; `fit` is the Trainer with the model
`tiny`, as users start it, and without validation.

    python scripts/bench_loader.py --tokens 50_000_000 --rounds 5 --out FILE.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from bench_trainer_overhead import configuration
from benchmarks.report import conditions

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.assembly import assemble
from pkm_lightning.data import TokensDataModule
from pkm_lightning.data.cache import CacheKey, Source, open_cache
from pkm_lightning.data.shards.format import ShardInfo, ShardWriter
from pkm_lightning.data.tokenizer import Tokenizer, train_bpe
from pkm_lightning.training import LanguageModule

SHARD_TOKENS = 4_000_000
#: Tokens of a document: the median, and the standard deviation of its logarithm, as in web text.
MEDIAN, SPREAD = 300, 1.0
SEQ_LEN, GLOBAL_BATCH = 256, 16
FIELDS = ("what", "packing", "workers", "rounds", "tokens_s", "min", "max", "times_fit")


def write_corpus(root: Path, tokens: int) -> Path:
    """Returns a folder of shards as `prepare` leaves them."""
    tokenizer = train_bpe([" ".join(str(i) for i in range(3000))], 1000)

    def build(folder: Path) -> list[Source]:
        tokenizer.save(folder / "tokenizer.json")
        rng = np.random.default_rng(0)
        shards = range(-(-tokens // SHARD_TOKENS))
        train = [_write_shard(folder, f"train-{k:05}", SHARD_TOKENS, rng, tokenizer) for k in shards]
        validation = [_write_shard(folder, "validation-00000", 100_000, rng, tokenizer)]
        parts = {"train": [asdict(info) for info in train], "validation": [asdict(info) for info in validation]}
        read = {"files": 1, "documents": sum(info.documents for info in train), "bytes": 0}
        index = {"vocab_size": tokenizer.vocab_size, "parts": parts, "read": read, "skipped": {}}
        (folder / "shards.json").write_text(json.dumps(index))
        return []

    return open_cache(root, CacheKey("corpus", {"tokens": tokens}), build)


def _write_shard(folder: Path, name: str, tokens: int, rng: np.random.Generator, tokenizer: Tokenizer) -> ShardInfo:
    writer = ShardWriter(folder, name, tokenizer.vocab_size)
    while writer.tokens < tokens:
        length = int(np.clip(rng.lognormal(np.log(MEDIAN), SPREAD), 1, 100_000))
        ids = rng.integers(2, tokenizer.vocab_size, length)
        writer.begin_document(0, writer.tokens)
        writer.write(np.append(np.where(ids == tokenizer.eos_id, 2, ids), tokenizer.eos_id), learned=True)
    return writer.close()


def loader_rate(folder: Path, cache: Path, packing: str, workers: int, seconds: float) -> float:
    """Returns valid tokens per second of the batches, from the second one on."""
    data = TokensDataModule(
        path=str(folder), val_path=None, test_path=None, packing=packing, seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH, num_workers=workers, order_seed=0, cache_dir=str(cache), prompts=[],
        prompts_file=None,
    )  # fmt: skip
    data.prepare_data()
    batches = iter(data.train_dataloader())
    next(batches)
    tokens, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        tokens += int(next(batches)["valid"].sum())
    return tokens / passed


def fit_rate(folder: Path, cache: Path, steps: int) -> float:
    """Returns tokens per second of `trainer.fit` with the model `tiny`."""
    with tempfile.TemporaryDirectory() as run_dir:
        sizes = [f"data.seq_len={SEQ_LEN}", f"data.global_batch_size={GLOBAL_BATCH}", f"data.cache_dir={cache}"]
        overrides = ["ffn=dense", "data=tokens", f"data.path={folder}", *sizes]
        run = resolve(configuration(overrides, steps + 1, run_dir))
        assembly, clock = assemble(run), StepClock()
        assembly.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        assembly.trainer.fit(LanguageModule(run.config), datamodule=run.data)
        return SEQ_LEN * GLOBAL_BATCH * steps / (clock.ends[-1] - clock.ends[0])


class StepClock(L.Callback):
    """The times at which steps end; the first one is longer, since buffers are made."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Appends the time."""
        self.ends.append(time.perf_counter())


def main() -> None:
    """Runs the rounds, prints and, with `--out`, writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts = conditions(torch.device("cpu"))
    ways = [(packing, workers) for packing in ("windows", "documents", "none") for workers in (0, 2)]
    rates: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    fits: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = write_corpus(root / "corpus", arguments.tokens)
        for _ in range(arguments.rounds):
            fits.append(fit_rate(folder, root / "cache", arguments.steps))
            for packing, workers in ways:
                rate = loader_rate(folder, root / "cache", packing, workers, arguments.seconds)
                rates[packing, workers].append(rate)
    rows = [_row("fit, model=tiny", "windows", 0, fits, fits)]
    rows += [_row("loader", packing, workers, rates[packing, workers], fits) for packing, workers in ways]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*FIELDS, *facts])
            writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)


def _row(what: str, packing: str, workers: int, rates: list[float], fits: list[float]) -> dict[str, Any]:
    # Each round against the fit of the same round: other processes of the machine slow both.
    ratio = statistics.median(rate / fit for rate, fit in zip(rates, fits, strict=True))
    values = (what, packing, workers, len(rates), *(round(f(rates)) for f in (statistics.median, min, max)))
    return dict(zip(FIELDS, (*values, f"{ratio:.1f}"), strict=True))


if __name__ == "__main__":
    main()
