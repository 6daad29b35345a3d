"""Fits that SlotUsage watches, on padded batches, in one process or on each rank of a group; and a plain recount.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import lightning as L
import torch
import torch.distributed as dist
from training.fits import loader, rows

from pkm_lightning.callbacks import SlotUsage
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.training import LanguageModule

Micro = tuple[dict[str, torch.Tensor], torch.Tensor]


class Once(SlotUsage):
    """Notes the steps for which it computes figures."""

    def _figures(self) -> dict[str, float]:
        assert self.counters is not None
        self.looked = [*getattr(self, "looked", []), self.counters.clock]
        return super()._figures()


class Raw(L.Callback):
    """Keeps a copy of all traces: per step, the trace of each layer and where its tokens are real."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[int, dict[str, torch.Tensor]], torch.Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        def watch(traces: Any, batch: Any) -> None:
            kept = {layer: {n: v.clone() for n, v in trace.items()} for layer, trace in traces.items()}
            self.seen.append((trainer.global_step + 1, kept, batch["valid"].clone()))

        pl_module.watch.watchers.append(watch)

    def reads(self, layer: int, name: str, steps: Sequence[int] | None = None) -> list[tuple[int, float]]:
        """Returns (slot, |weight|) of every read of a real token."""
        pairs = []
        for step, traces, valid_BT in self.seen:
            if steps is None or step in steps:
                trace = traces[layer]
                weights = trace[f"{name}_weights"][valid_BT].double().abs()
                if f"{name}_ids" in trace:
                    ids = trace[f"{name}_ids"][valid_BT]
                    pairs += list(zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True))
                else:
                    chosen = trace[f"{name}_chosen"][valid_BT]
                    pairs += [(int(slot), float(weights[t, slot])) for t, slot in chosen.nonzero().tolist()]
        return pairs


def usage(folder: Path | str, **changes: Any) -> SlotUsage:
    defaults: dict[str, Any] = {
        "path": str(Path(folder) / "usage.json"), "every_n_steps": None, "window": 4, "dead_after": 2,
        "per_head": False, "panels_every_n_steps": None,
    }  # fmt: skip
    return Once(**{**defaults, **changes})


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Returns the same global batches for every number of ranks; most sequences end with padding."""
    torch.manual_seed(7)
    made = []
    for _ in range(steps):
        batch = rows(jobs.GLOBAL_BATCH, length=6)
        batch["valid"] = torch.arange(6) < torch.tensor([6, 5, 4, 3, 6, 2, 1, 5])[:, None]
        batch["labels"] = batch["labels"].masked_fill(~batch["valid"], NO_TARGET)
        made.append(batch)
    return made


def fit(
    overrides: Sequence[str], steps: int, callbacks: Sequence[L.Callback], done: int = 0, **options: Any
) -> tuple[LanguageModule, L.Trainer, list[dict[str, float]]]:
    """Trains as `distributed_jobs.fit` does."""
    settings = copy.deepcopy(jobs.settings(*overrides, steps=steps))
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    settings["trainer"]["devices"] = world
    accumulate = settings["trainer"]["accumulate_grad_batches"]
    made = batches(steps)
    mine = [
        jobs.share(batch, world * accumulate, micro * world + rank)
        for batch in made[done:] + made[:done]  # a resumed epoch begins where the loader does, and keeps its length
        for micro in range(accumulate)
    ]
    losses = jobs.Losses()
    loggers = options.pop("loggers", [])
    trainer = make_trainer(settings, callbacks=[losses, *callbacks], loggers=loggers)
    module = LanguageModule(settings)
    trainer.fit(module, loader(mine), **options)
    return module, trainer, losses.seen


def counted(watching: SlotUsage) -> dict[str, list[Any]]:
    """Returns reads and weights since the start, those of the window, and last reads, over all ranks, by name."""
    counters = watching.counters
    assert counters is not None
    by_name: dict[str, list[Any]] = {}
    for name in (*counters.readers, *counters.tables):
        sums = [counters.total(name, span) for span in ("ever", "window")]  # type: ignore[arg-type]
        by_name[name] = [part.tolist() for total in sums for part in total] + [counters.last_read(name).tolist()]
    return by_name


def count(overrides: list[str], steps: int, save: str = "", resume: str = "", done: int = 0) -> Any:
    """Returns the counters of all ranks after a training, its logs, and whether this rank wrote usage.json."""
    with tempfile.TemporaryDirectory() as folder:
        watching = usage(folder)
        options = {"ckpt_path": resume} if resume else {}
        _, trainer, seen = fit(overrides, steps, [watching], done, **options)
        if save:
            trainer.save_checkpoint(save)
        logged = [{k: v for k, v in row.items() if "usage" in k} for row in seen]
        assert watching.looked == list(range(done + 1, steps + 1))  # type: ignore[attr-defined]
        written = (Path(folder) / "usage.json").exists()
        return counted(watching), logged, written


def histogram(reads: list[tuple[int, float]], n_slots: int) -> tuple[list[int], list[float]]:
    """Returns the number of reads and the summed weight of each slot."""
    counts, weights = Counter(slot for slot, _ in reads), [0.0] * n_slots
    for slot, weight in reads:
        weights[slot] += weight
    return [counts[slot] for slot in range(n_slots)], weights
