"""Tokens per second of whole models that write: prefill and decoding, with and without a cache of keys and values.

    python scripts/bench_generation.py [--rounds 3] [--folder FOLDER] [--out]

Dense, MoE and Memory+ models have equal forward FLOPs per token; all differ in one layer of three. The table of Memory+
lies in memory, or in a safetensors file that is mapped. Prompts have equal lengths, weights are untrained, choice is
greedy. Rounds are interleaved, and each starts with another way. Without a cache each token repeats the whole forward,
so that fewer tokens are written there. The first call of each way is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.report import conditions
from hydra import compose, initialize_config_module

from pkm_lightning.build.loading import load
from pkm_lightning.build.model import build_model
from pkm_lightning.build.run import resolve
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.export import write as export
from pkm_lightning.cli.job import plain
from pkm_lightning.inference.generation import Generation, Speed
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.model import Transformer, model_cost

#: By FFN, the sizes that are not the model's.
FFNS = {"dense": [], "moe": ["placement=middle"], "memory_plus": ["placement=middle"]}
FIELDS = (
    *("dim", "layers", "ffn", "table", "cache", "trunk_flops", "params", "batch", "prompt", "new_tokens", "rounds"),
    *(
        "prefill_s",
        "prefill_min",
        "prefill_max",
        "decode_s",
        "decode_min",
        "decode_max",
        "times_dense",
        "times_uncached",
    ),
)


class Size(NamedTuple):
    """Sizes of a model, and the lengths of what it reads and writes."""

    dim: int
    heads: int
    n_keys: int
    prompt: int
    new_tokens: int
    new_without_cache: int


SIZES = (Size(64, 4, 128, 64, 64, 8), Size(1024, 16, 256, 32, 8, 2))
SMOKE = (Size(32, 2, 16, 4, 3, 2),)


class Codec:
    """A stand-in for a tokenizer: ids alone count, and none of them ends an answer."""

    eos_id = -1

    def encode(self, text: str) -> list[int]:
        """Returns no ids: prompts are given as ids."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns no text."""
        return ""


class Uncached:
    """A model whose every token repeats the whole forward."""

    is_cacheable, end_ids = False, ()

    def __init__(self, model: Transformer) -> None:
        self._model, self.unembed = model, model.unembed

    def __call__(self, input_ids_BT: torch.Tensor, **_: Any) -> Any:
        """Runs the model on all tokens so far."""
        return self._model(input_ids_BT)


class Way(NamedTuple):
    """A model and where its table lies, with or without a cache."""

    ffn: str
    table: str
    cache: bool
    model: Transformer

    def speed(self, size: Size, batch: int) -> Speed:
        """Writes one batch of answers."""
        draw = torch.Generator().manual_seed(batch)
        prompts = torch.randint(500, (batch, size.prompt), generator=draw).tolist()
        new = size.new_tokens if self.cache else size.new_without_cache
        model: Any = self.model if self.cache else Uncached(self.model)
        made = Generation(
            model, Codec(), prompts, Sampling(max_new_tokens=new), device=torch.device("cpu"), batch_size=batch
        )
        made.run()
        return made.speed


def models(size: Size, folder: Path) -> Iterator[tuple[str, str, Transformer]]:
    """Yields FFN, place of the table and model."""
    for ffn, overrides in FFNS.items():
        sizes = [f"model.dim={size.dim}", "model.n_layers=3", f"model.n_heads={size.heads}", "model.vocab_size=512"]
        sizes += [
            f"model.n_kv_heads={size.heads}",
            f"model.memory.n_keys={size.n_keys}",
            f"model.ffn_dim={4 * size.dim}",
        ]
        with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
            match = "none" if ffn == "dense" else "flops"
            composed = compose("config", overrides=[f"ffn={ffn}", *overrides, *sizes, f"match={match}", "data=custom"])
        composed.data = {"_target_": "lightning.LightningDataModule"}
        config = resolve(plain(composed)).config
        model = build_model(config).eval()
        model.init_weights(0)
        yield ffn, "memory" if model.value_tables else "", model
        if model.value_tables:
            state = {f"model.{name}": value for name, value in model.state_dict().items()}
            torch.save(
                {"state_dict": state, "tokens_seen": 0, "hyper_parameters": {"config": config}}, folder / "a.ckpt"
            )
            export(SavedCheckpoint(folder / "a.ckpt"), folder / "a.safetensors")
            yield ffn, "mapped", load(folder / "a.safetensors", table_device="mmap").model


def measure(size: Size, folder: Path, rounds: int, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields a line per way and batch."""
    ways = [
        Way(ffn, table, cache, model)
        for ffn, table, model in models(size, folder)
        for cache in ((True,) if table == "mapped" else (True, False))
    ]
    for batch in batches:
        speeds: dict[Way, list[Speed]] = {way: [] for way in ways}
        for way in ways:
            way.speed(size._replace(new_tokens=2, new_without_cache=1), batch if size.dim < 128 else 1)
        for number in range(rounds):
            # The way that comes first would otherwise always meet the same state of the machine.
            shift = number % len(ways)
            for way in ways[shift:] + ways[:shift]:
                speeds[way].append(way.speed(size, batch))
        decoding = {way: statistics.median(_rates(made, "new")) for way, made in speeds.items()}
        for way, made in speeds.items():
            cost = model_cost(way.model, size.prompt)
            dense = next(rate for other, rate in decoding.items() if (other.ffn, other.cache) == ("dense", way.cache))
            without = [rate for other, rate in decoding.items() if other[:2] == way[:2] and not other.cache]
            line = {
                "dim": size.dim, "layers": 3, "ffn": way.ffn, "table": way.table,
                "cache": "yes" if way.cache else "no", "trunk_flops": cost.trunk_flops, "params": cost.params_total,
                "batch": batch, "prompt": size.prompt, "rounds": rounds,
                "new_tokens": size.new_tokens if way.cache else size.new_without_cache,
                "times_dense": f"{decoding[way] / dense:.2f}",
                "times_uncached": f"{decoding[way] / without[0]:.2f}" if without else "",
            }  # fmt: skip
            for name, part in (("prefill", "prompt"), ("decode", "new")):
                rates = _rates(made, part)
                line |= {f"{name}_s": f"{statistics.median(rates):.0f}"}
                line |= {f"{name}_min": f"{min(rates):.0f}", f"{name}_max": f"{max(rates):.0f}"}
            yield line


def _rates(speeds: Sequence[Speed], part: str) -> list[float]:
    """Returns tokens per second of each round."""
    return [getattr(speed, f"{part}_tokens") / getattr(speed, f"{part}_seconds") for speed in speeds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and, with `--out`, writes scripts/results/DATE-bench-generation.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--folder", type=Path, help="for the temporary files, on the disk of interest")
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"))
    parsed = parser.parse_args(arguments)
    facts = conditions(torch.device("cpu"))
    out: Path | None = parsed.out
    if out and out.suffix != ".csv":
        out = out / f"{facts['date']}-bench-generation.csv"
    with contextlib.nullcontext() if out is None else out.open("w", newline="", buffering=1) as file:
        writer = None if file is None else csv.DictWriter(file, [*facts, *FIELDS])
        if writer:
            writer.writeheader()
        for size in SMOKE if parsed.smoke else [size for size in SIZES if size.dim in parsed.dims]:
            with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
                for line in measure(size, Path(folder), parsed.rounds, parsed.batches):
                    print("  ".join(f"{key} {value}" for key, value in line.items() if value != ""), flush=True)
                    if writer:
                        writer.writerow({**facts, **line})


if __name__ == "__main__":
    main()
