"""The gradient of a table in compact form: one row per table row that was read.

The gradient of a row is a sum over its reads. With the reads sorted into segments, one reader computes each sum in one
order: there are no atomic additions, and every run gives the same bits.

Letters: L reads, X source rows, V values per row, N rows of the table, U segments.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.segments import Segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["row_gradients"]


def row_gradients(
    segments: Segments,
    coefficients_L: Float[Tensor, " L"],
    sources_L: Int[Tensor, " L"],
    source_rows_XV: Float[Tensor, "X V"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "U V"]:
    """Computes `grads[u] = sum over the reads l of segment u of coefficients[l] * source_rows[sources[l]]`.

    For a weighted gather `y[t] = sum_k w[t, k] * table[ids[t, k]]` with g = dL/dy, the coefficients are w, the source
    rows are g, and the source of read (t, k) is t: then grads[u] is dL/dtable[rows[u]]. The op has no gradient itself.

    Args:
        segments: `read_segments(ids_L, n_rows)`; an empty segment (row -1) gives zeros.
        coefficients_L: any floating dtype, in the order of the ids before the sort.
        sources_L: the source row that each read multiplies, int32 or int64, 0 to X - 1 (not checked).
        source_rows_XV: any floating dtype.
        backend: `auto`, `triton`, `eager` (ATen's embedding bag) or `reference` (a loop).

    Returns:
        grads_UV in float32 (float64 for float64 source rows), summed in that dtype. The order of the additions depends
        only on the segments, so that two runs give the same bits.

    Raises:
        ValueError: shapes that do not fit, sources that are not integers, or an unknown backend.
    """
    if source_rows_XV.ndim != 2 or not segments.order_L.shape == coefficients_L.shape == sources_L.shape:
        raise ValueError(
            "row_gradients: needs source rows (X, V) and one coefficient and one source for each of the "
            f"{segments.order_L.numel()} reads, got {tuple(source_rows_XV.shape)}, {tuple(coefficients_L.shape)}, "
            f"{tuple(sources_L.shape)}."
        )
    if sources_L.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"row_gradients: sources are {sources_L.dtype}; allowed: torch.int32, torch.int64.")
    default = "triton" if best_backend(source_rows_XV) == "triton" else "eager"
    implementation = choose_backend("row_gradients", backend, default, _BACKENDS, source_rows_XV)
    return implementation(*segments, coefficients_L, sources_L, source_rows_XV)


# A custom operator, because torch.compile cannot trace the kernels, and because the FLOP counter sees operators only.
@library.custom_op("pkm_lightning::row_gradients", mutates_args=())
def _row_gradients(
    order: Tensor,
    rows: Tensor,
    starts: Tensor,
    coefficients: Tensor,
    sources: Tensor,
    source_rows: Tensor,
    backend: str,
) -> Tensor:
    # Without reads there is nothing to launch, and ATen's embedding bag has no bag.
    if order.numel() == 0:
        return source_rows.new_zeros(len(rows), source_rows.shape[1], dtype=_sum_dtype(source_rows))
    segments = Segments(order, rows, starts)
    result: Tensor = _kernels(backend).row_sums(
        segments, coefficients.contiguous(), sources.contiguous(), source_rows.contiguous()
    )
    return result


@_row_gradients.register_fake
def _(
    order: Tensor,
    rows: Tensor,
    starts: Tensor,
    coefficients: Tensor,
    sources: Tensor,
    source_rows: Tensor,
    backend: str,
) -> Tensor:
    return source_rows.new_empty(rows.shape[0], source_rows.shape[1], dtype=_sum_dtype(source_rows))


@register_flop_formula(torch.ops.pkm_lightning.row_gradients)
def _flops(
    order: list[int], rows: object, starts: object, coefficients: object, sources: object, source_rows: list[int],
    *_: object, **__: object,
) -> int:  # fmt: skip
    return 2 * order[0] * source_rows[1]


def _sum_dtype(source_rows_XV: Tensor) -> torch.dtype:
    return torch.promote_types(source_rows_XV.dtype, torch.float32)


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{backend}")


_BACKENDS = {name: functools.partial(_row_gradients, backend=name) for name in ("triton", "eager", "reference")}
