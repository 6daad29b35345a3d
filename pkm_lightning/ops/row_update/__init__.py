"""One optimizer update of the table rows that a step has read, from the reads themselves: no N x D gradient exists.

Letters: N rows, D values a row, L reads of the step, X source rows, U rows touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.row_update.rules import RowRule
from pkm_lightning.ops.segments import Segments, check_indices, read_segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["RowGradient", "RowRule", "row_gradient", "row_gradient_norm", "row_gradient_squares", "row_update"]


class RowGradient(NamedTuple):
    """The gradient of a table in factored form: that of row `n` is the sum over its reads l of
    `coefficients[l] * source_rows[sources[l]]`. For a weighted gather the coefficients are the weights and the source
    rows the output's gradients."""

    #: Rows of the table.
    n_rows: int
    segments: Segments
    #: (L,), the dtype that sums are taken in: fp32, or fp64 for an fp64 table.
    coefficients_L: Tensor
    #: (L,) int32.
    sources_L: Tensor
    #: (X, D) in the table's dtype.
    source_rows_XD: Tensor


def row_gradient(
    n_rows: int,
    ids_L: Int[Tensor, " L"],
    coefficients_L: Float[Tensor, " L"],
    sources_L: Int[Tensor, " L"],
    source_rows_XD: Float[Tensor, "X D"],
) -> RowGradient:
    """Sorts the reads by row: the one sort that the norm and the update of a step share.

    Args:
        n_rows: rows N of the table.
        ids_L: int32 or int64, 0 to N - 1.
        coefficients_L: any floating dtype.
        sources_L: int32 or int64, 0 to X - 1.
        source_rows_XD: in the table's dtype.

    Raises:
        ValueError: shapes that do not fit; on the CPU also ids or sources out of range, which no other device checks.
    """
    if not (ids_L.shape == coefficients_L.shape == sources_L.shape and ids_L.ndim == 1 and source_rows_XD.ndim == 2):
        raise ValueError(
            "row_gradient: needs ids, coefficients and sources of one shape (L,) and source rows (X, D), got "
            f"{tuple(ids_L.shape)}, {tuple(coefficients_L.shape)}, {tuple(sources_L.shape)}, "
            f"{tuple(source_rows_XD.shape)}."
        )
    check_indices("row_gradient", "ids", ids_L, n_rows)
    check_indices("row_gradient", "sources", sources_L, len(source_rows_XD))
    sums = torch.promote_types(source_rows_XD.dtype, torch.float32)
    return RowGradient(
        n_rows,
        read_segments(ids_L, n_rows),
        coefficients_L.to(sums).contiguous(),
        sources_L.int().contiguous(),
        source_rows_XD,
    )


def row_gradient_norm(gradient: RowGradient, *, backend: str = "auto") -> Float[Tensor, ""]:
    """L2 norm of the gradient over all rows, a scalar in the dtype of the coefficients; waits for no device."""
    return cast("Tensor", _implementation("row_gradient_norm", gradient, backend)(gradient))


def row_gradient_squares(gradient: RowGradient, *, backend: str = "auto") -> Float[Tensor, " U"]:
    """Sum of g**2 over the columns of each row that was read, g its gradient before any `scale`.

    Where columns of a table are spread over ranks, the sums of the ranks, added and divided by the whole row's width,
    are what `row_update` takes as `row_squares_U`.

    Args:
        gradient: the reads of the step.
        backend: `auto`, `eager`, `cpu`, `triton` or `reference`.

    Returns:
        One sum for each of `gradient.segments.rows_U`, in the dtype of the coefficients; zero where that holds -1.

    Raises:
        ValueError: an unknown backend, or one that cannot sum in float64.
    """
    return cast("Tensor", _implementation("row_gradient_squares", gradient, backend)(gradient))


def row_update(
    table_ND: Float[Tensor, "N D"],
    gradient: RowGradient,
    rule: RowRule,
    state: Mapping[str, Tensor],
    *,
    scale: Tensor | float = 1.0,
    row_squares_U: Float[Tensor, " U"] | None = None,
    backend: str = "auto",
) -> None:
    """Updates, in place, the rows that were read and their entries of `state`; every other row stays as it is.

    Sums and the rule are computed in fp32 (fp64 for fp64 tables), reads of a row in their order. A bf16 table is
    rounded stochastically: an update below its last bit arrives on average instead of never.

    Args:
        table_ND: fp32, fp64 or bf16.
        gradient: the reads of the step.
        rule: the optimizer and its numbers for this step.
        state: what `new_state` made, moved by each update.
        scale: factor on the gradient (clipping, averages), a number or a scalar tensor that the host need not read.
        row_squares_U: for `row_adagrad` on a table with a part of the columns: the mean of g**2 over the whole row,
            before `scale`, for each of `gradient.segments.rows_U`, in the dtype of the coefficients. None: the
            table's own columns are the whole row.
        backend: `auto`, `eager`, `cpu`, `triton` or `reference`.

    Raises:
        ValueError: a dtype, shape or state that does not fit, `row_squares_U` for another rule, or an unknown backend.
    """
    if table_ND.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"row_update: the table is {table_ND.dtype}; allowed: torch.float32, float64, bfloat16.")
    if gradient.source_rows_XD.dtype is not table_ND.dtype or gradient.source_rows_XD.shape[1] != table_ND.shape[1]:
        raise ValueError(
            f"row_update: source rows are {gradient.source_rows_XD.dtype} of {gradient.source_rows_XD.shape[1]} "
            f"values, the table {table_ND.dtype} of {table_ND.shape[1]}; both need one dtype and width."
        )
    rule.check_state(state, table_ND)
    if gradient.n_rows != len(table_ND):
        raise ValueError(f"row_update: the gradient is of a table of {gradient.n_rows} rows, this has {len(table_ND)}.")
    if not table_ND.is_contiguous():
        raise ValueError("row_update: the table must be contiguous.")
    if row_squares_U is not None:
        _check_row_squares(row_squares_U, gradient, rule)
    with torch.no_grad():
        _implementation("row_update", gradient, backend)(table_ND, gradient, rule, state, scale, row_squares_U)


def _check_row_squares(row_squares_U: Tensor, gradient: RowGradient, rule: RowRule) -> None:
    if rule.kind != "row_adagrad":
        raise ValueError(f"row_update: row_squares_U is given to {rule.kind}; only row_adagrad takes it.")
    rows_U, coefficients_L = gradient.segments.rows_U, gradient.coefficients_L
    found = tuple(row_squares_U.shape), row_squares_U.dtype, row_squares_U.device
    expected = tuple(rows_U.shape), coefficients_L.dtype, rows_U.device
    if found != expected:
        raise ValueError(
            f"row_update: row_squares_U is {found[1]} of shape {found[0]} on {found[2]}; this gradient needs "
            f"{expected[1]} of shape {expected[0]} on {expected[2]}, a number for each of its rows_U."
        )


def _implementation(name: str, gradient: RowGradient, backend: str) -> Callable[..., object]:
    """`name` of the module of the backend: numba and triton are imported where they are first needed."""
    rows_XD = gradient.source_rows_XD
    default = best_backend(rows_XD)
    if rows_XD.dtype is torch.float64:
        if backend in ("cpu", "triton"):
            raise ValueError(f"row_update: backend={backend!r} sums in float32; use backend=eager for float64 tables.")
        default = "eager"
    module = choose_backend("row_update", backend, default, _MODULES, rows_XD)()
    return cast("Callable[..., object]", getattr(module, name))


_MODULES = {
    name: (lambda module=f"{__name__}.{name}": importlib.import_module(module))
    for name in ("eager", "cpu", "triton", "reference")
}
