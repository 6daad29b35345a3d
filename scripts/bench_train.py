"""Training with a sparse memory: a step of the table, its peak memory, a step of an FFN layer, tokens/s of a model.

    python scripts/bench_train.py [--device cuda] [--only R5] [--out]

R5 is a step of the table alone: forward, backward, clipping by norm (except for "no clip"), update. `dense` is
autograd's gradient of the whole table and torch's AdamW; `rows` is the package's `table.learning=rows`. Lazy Adam,
row-wise Adagrad and SGD are other algorithms than AdamW; `catch_up_adam` equals Adam with beta1 = 0. R9 measures the
bytes at the peak of a step per value of the table: their ratio is how many times larger a table fits into memory. R4 is
the update alone, R6 one FFN layer, R7 a whole model in a plain loop and in the Trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from benchmarks.blocks import Block, block_case
from benchmarks.case import Options, Row
from benchmarks.inputs import Lookup
from benchmarks.models import Model, model_case
from benchmarks.protocol import benchmark
from benchmarks.steps import MAIN_WAYS, MEMORY_WAYS, WAYS, StepWay, step_case
from benchmarks.trainer import trainer_case
from benchmarks.updates import update_case


class Plan(NamedTuple):
    """Sizes for one kind of device.

    Args:
        steps: table steps with all ways.
        most_steps: table steps with all ways but SparseAdam.
        main_steps: table steps with the main ways.
        memory: the table of R9.
        blocks: FFN layers.
        updates: tables whose updates are timed alone; a GPU's, as are the whole models.
        models: whole models in a plain loop.
    """

    steps: Sequence[Lookup]
    most_steps: Sequence[Lookup]
    main_steps: Sequence[Lookup]
    memory: Lookup
    blocks: Sequence[Block]
    updates: Sequence[Lookup]
    models: Sequence[Model]


# Every kind of row at the smallest sizes.
SMOKE = Plan(
    [Lookup(16, 8, 256, 16, "uniform")],
    [],
    [Lookup(16, 8, 256, 16, "zipf")],
    Lookup(16, 8, 256, 16, "uniform"),
    [Block(64, 16, 48, 16, 8, True)],
    [Lookup(16, 8, 256, 16, "uniform")],
    [Model(Block(64, 16, 48, 16, 8, False), sequences=2, vocab_size=50, layers=3, heads=2, experts=2)],
)
CPU = Plan(
    [Lookup(1024, 128, 2**20, 256, "uniform")],
    [Lookup(4096, 128, 2**18, 256, "uniform")],
    [Lookup(4096, 128, 2**18, 256, "zipf")],
    Lookup(256, 128, 2**17, 256, "uniform"),
    [Block(2048, 256, 688, 512, 64, True), Block(2048, 512, 1376, 256, 128, True)],
    [],
    [],
)
GPU = Plan(
    [Lookup(16384, 128, 2**20, 1024, "uniform")],
    [Lookup(16384, 128, 2**24, 1024, "uniform")],
    [
        Lookup(16384, 128, 2**20, 1024, "zipf"),
        Lookup(16384, 128, 2**20, 1536, "uniform"),
        Lookup(4096, 128, 2**22, 1024, "uniform"),
    ],
    Lookup(4096, 128, 2**20, 1024, "uniform"),
    [Block(16384, 4096, 14336, 1024, 2048, False), Block(16384, 2048, 5504, 1024, 1024, False)],
    [Lookup(16384, 128, 2**20, 1024, "uniform")],
    [Model(Block(16384, 1024, 2816, 1024, 512, False), sequences=8, vocab_size=32000, layers=12, heads=16, experts=11)],
)


def plan(options: Options) -> Iterator[Row]:
    """Yields the rows."""
    device, dtype = options.device, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    sizes = SMOKE if options.smoke else GPU if device.type == "cuda" else CPU

    # Half the table gives a second point of memory against size, whose slope is the bytes per value.
    def step(name: str, lookup: Lookup, ways: list[StepWay], timed: bool = True) -> Row:
        tiny, half = SMOKE.memory, lookup._replace(rows=lookup.rows // 2)
        make, make_tiny, make_half = (
            functools.partial(step_case, one, device, dtype, ways, timed=timed) for one in (lookup, tiny, half)
        )
        return Row(name, make, make_tiny, None if timed else make_half, str(lookup))

    for lookup in sizes.steps:
        yield step("R5 table step", lookup, WAYS)
    for lookup in sizes.most_steps:
        yield step("R5 table step", lookup, [way for way in WAYS if not way.sparse])
    for lookup in sizes.main_steps:
        yield step("R5 table step", lookup, MAIN_WAYS)
    for lookup in sizes.updates:
        make_update = functools.partial(update_case, lookup, device, dtype)
        yield Row("R4 optimizer step", make_update, make_update, sizes=str(lookup))
    yield step("R9 memory of a step", sizes.memory, MEMORY_WAYS, timed=False)
    for block in sizes.blocks:
        make = functools.partial(block_case, block, device, dtype)
        yield Row("R6 block step", make, make, sizes=str(block))
    for model in sizes.models:
        make = functools.partial(model_case, model, device, dtype)
        yield Row("R7 whole model", make, make, sizes=str(model))
    # None: the default model.
    for dim in (None,) if options.smoke else (None, 256):
        make_model = functools.partial(trainer_case, dim, options.smoke, device, options.cpu_time)
        yield Row("R7 model in the Trainer", make_model, make_model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the plan of the device."""
    benchmark("train", __doc__, plan, arguments)


if __name__ == "__main__":
    main()
