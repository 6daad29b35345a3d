"""Runs of a few steps whose traffic and memory are counted, and the plans to compare them with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import torch.distributed as dist
from distributed_jobs import GLOBAL_BATCH, batches, settings, share
from torch import Tensor
from torch.distributed.tensor import DTensor
from traffic import Received
from training.fits import loader

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.capacity import Plan, make_plan
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.training import LanguageModule

STEPS = 3
LENGTH = 6  # tokens per row of `batches`


class Steps(L.Callback):
    """What was received until the start of each batch and the end of the last."""

    def __init__(self, received: Received) -> None:
        self.received = received
        self.until: list[Counter[tuple[str, str]]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.until.append(self.received.bytes.copy())

    def on_train_end(self, *_: Any) -> None:
        self.until.append(self.received.bytes.copy())


def counted(overrides: list[str]) -> dict[str, Any]:
    """Returns the bytes of one step after the first, by kind and operation, and what this rank then holds."""
    given = settings(*overrides, steps=STEPS)
    world, rank = dist.get_world_size(), dist.get_rank()
    given["trainer"]["devices"], accumulate = world, given["trainer"]["accumulate_grad_batches"]
    mine = [share(b, world * accumulate, m * world + rank) for b in batches(STEPS) for m in range(accumulate)]
    received = Received()
    steps = Steps(received)
    trainer = make_trainer(given, callbacks=[steps], loggers=[])
    module = LanguageModule(given)
    with received:
        trainer.fit(module, loader(mine))
    # Engines record the order of modules in their first step, and gather more than later.
    first, last = steps.until[accumulate], steps.until[-1]
    return {
        "received": {key: (last[key] - first[key]) / (STEPS - 1) for key in last},
        "held": _held(module, trainer.optimizers[0]),
    }


def _held(module: LanguageModule, optimizer: Any) -> dict[str, int]:
    tables = module.model.value_tables
    weights = {id(table.weight) for table in tables}
    dense = [p for p in module.parameters() if id(p) not in weights]
    states: Counter[bool] = Counter()
    for parameter, state in optimizer.state.items():
        states[id(parameter) in weights] += sum(_bytes(v) for v in state.values() if isinstance(v, Tensor) and v.ndim)
    stages = [table.stage for table in tables if table.stage is not None]
    buffers = [b for s in stages for b in (s._ids, s._coefficients, s._sources, s._rows) if b._storage is not None]
    return {
        "dense_weights": sum(_bytes(p) for p in dense),
        "dense_states": states[False],
        "table_part": sum(_bytes(table.weight) for table in tables),
        "table_states": states[True],
        # Factors of reads without weights are no buffers, but kept from step to step.
        "staged_reads": sum(buffer._storage.nbytes for buffer in buffers if buffer._storage is not None)
        + sum(units.nbytes for stage in stages for units in stage._units or ()),
    }


def _bytes(value: Tensor) -> int:
    return value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes


def planned(world: int, overrides: list[str]) -> Plan:
    """Returns the plan of the same run."""
    given = settings(f"data.global_batch_size={GLOBAL_BATCH}", f"data.seq_len={LENGTH}", *overrides, steps=STEPS)
    given["trainer"]["devices"] = world
    return make_plan(build_meta_model(given), given)


def by_kind(received: dict[tuple[str, str], float]) -> dict[str, float]:
    """Sums over operations."""
    kinds: Counter[str] = Counter()
    for (kind, _), size in received.items():
        kinds[kind] += size  # type: ignore[assignment]
    return dict(kinds)
