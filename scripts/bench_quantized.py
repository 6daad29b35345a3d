"""Reads of quantised rows beside reads of float32 and bfloat16 rows: weighted sums and inner products.

    python scripts/bench_quantized.py [--device cuda] [--out]

All ways read the same rows of one table, each in its own format. A way is checked against float64 with the values that
its own rows stand for: what quantising changes is no error here, and is measured by quantize_models.py. A column `x
WAY` shows how many times faster a line is than that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from benchmarks.case import Case, Options, Row, Run, Way, relative_error
from benchmarks.inputs import Lookup, Reads
from benchmarks.protocol import benchmark
from torch import Tensor

from pkm_lightning.ops import (
    dequantize_rows,
    gathered_dot,
    quantize_rows,
    quantized_dot,
    quantized_gather,
    weighted_gather,
)
from pkm_lightning.ops.quantized_rows import WIDTHS

#: Of bfloat16, whose sums are rounded to 8 bits.
TOLERANCE = 2e-2
SMOKE = [Lookup(16, 8, 256, 40, "uniform")]
CPU = [Lookup(1024, 128, 2**18, 256, "uniform"), Lookup(1, 128, 2**18, 256, "uniform")]
GPU = [Lookup(16384, 128, 2**20, 1024, "uniform"), Lookup(64, 128, 2**20, 1024, "uniform")]


class Reader:
    """A way as a callable: a call reads all tokens; `table_NV` are the values that its rows stand for."""

    def __init__(self, read: Callable[[], Tensor], values: Callable[[], Tensor]) -> None:
        self.read, self.values = read, values

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor]:
        return (self.read(),)


def read_case(sizes: Lookup, device: torch.device, dot: bool) -> Case:
    """Builds the case: weighted sums of rows, or with `dot` inner products with them."""
    reads = Reads.draw(sizes, torch.float32, device)

    def error(run: Run) -> float:
        assert isinstance(run, Reader)
        own = reads._replace(table_NV=run.values())
        return relative_error([run()[0][reads.tokens_R]], [own.dots() if dot else own.sums()])

    def plain(dtype: torch.dtype) -> Reader:
        table_NV = reads.table_NV.to(dtype)
        if dot:
            return Reader(lambda: gathered_dot(table_NV, reads.upstream_TV, reads.ids_TK), lambda: table_NV)
        return Reader(lambda: weighted_gather(table_NV, reads.ids_TK, reads.weights_TK), lambda: table_NV)

    def quantised(bits: int, backend: str) -> Reader:
        rows = quantize_rows(reads.table_NV, bits)
        if dot:
            read = functools.partial(quantized_dot, rows, reads.upstream_TV, reads.ids_TK, backend=backend)
        else:
            read = functools.partial(quantized_gather, rows, reads.ids_TK, reads.weights_TK, backend=backend)
        return Reader(read, lambda: dequantize_rows(rows))

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return Case(
        sizes=str(sizes),
        ways=[
            *(Way(name, functools.partial(plain, dtype)) for name, dtype in names.items()),
            *(Way(name, functools.partial(quantised, bits, "auto")) for name, bits in WIDTHS.items()),
            Way("int4, eager", functools.partial(quantised, WIDTHS["int4"], "eager")),
        ],
        error=error,
        tolerance=TOLERANCE,
        baselines=["float32", "bfloat16"],
        memory=False,
    )


def plan(options: Options) -> Iterator[Row]:
    """Yields sums and inner products at each size of the device."""
    for sizes in SMOKE if options.smoke else GPU if options.device.type == "cuda" else CPU:
        for name, dot in (("weighted sum", False), ("inner product", True)):
            make = functools.partial(read_case, sizes, options.device, dot)
            yield Row(name, make, make)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the plan of the device."""
    benchmark("quantized", __doc__, plan, arguments)


if __name__ == "__main__":
    main()
