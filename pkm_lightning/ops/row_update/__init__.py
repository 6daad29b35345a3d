"""One optimizer update of the table rows that a step has read, computed from the reads without an N x V gradient.

Letters: N rows, V values per row, L reads of the step, X source rows, U rows that were read.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.row_update.rules import (
    COLUMN_STATE,
    RowRule,
    RowState,
    UpdateStep,
    find_rule,
    new_state,
    rule_names,
)
from pkm_lightning.ops.row_update.rules.base import check_state, state_bytes
from pkm_lightning.ops.segments import Segments, check_indices, read_segments

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = [
    "COLUMN_STATE",
    "RowGradient",
    "RowRule",
    "RowState",
    "UpdateStep",
    "find_rule",
    "new_state",
    "row_gradient",
    "row_gradient_dots",
    "row_gradient_norm",
    "row_gradient_squares",
    "row_update",
    "rule_names",
    "state_bytes",
]

_log = logging.getLogger(__name__)


class _Factors(NamedTuple):
    #: Rows of the table.
    n_rows: int
    segments: Segments
    #: (L,), in the dtype of the sums: fp32, or fp64 for an fp64 table.
    coefficients_L: Tensor
    #: (L,) int32.
    sources_L: Tensor
    #: (X, V) in the table's dtype.
    source_rows_XV: Tensor


class RowGradient(_Factors):
    """The gradient of a table in factored form.

    The gradient of row `n` is the sum over its reads l of `coefficients[l] * source_rows[sources[l]]`. For a weighted
    gather the coefficients are the weights, and the source rows are the gradients of the outputs. Between the norm and
    the update of a step its tensors must not change.
    """

    @functools.cached_property
    def shared(self) -> dict[str, Any]:
        """What a backend keeps from backward and norm for the update, by name; the update empties it."""
        return {}


def row_gradient(
    n_rows: int,
    ids_L: Int[Tensor, " L"],
    coefficients_L: Float[Tensor, " L"],
    sources_L: Int[Tensor, " L"],
    source_rows_XV: Float[Tensor, "X V"],
) -> RowGradient:
    """Sorts the reads by row; the norm and the update of a step share this sort.

    Args:
        n_rows: rows N of the table.
        ids_L: int32 or int64, 0 to N - 1.
        coefficients_L: any floating dtype.
        sources_L: int32 or int64, 0 to X - 1.
        source_rows_XV: in the table's dtype.

    Raises:
        ValueError: shapes that do not fit; on the CPU also ids or sources out of range. Other devices do not check
            these, because the host would have to wait for them.
    """
    if not (ids_L.shape == coefficients_L.shape == sources_L.shape and ids_L.ndim == 1 and source_rows_XV.ndim == 2):
        raise ValueError(
            "row_gradient: needs ids, coefficients and sources of one shape (L,) and source rows (X, V), got "
            f"{tuple(ids_L.shape)}, {tuple(coefficients_L.shape)}, {tuple(sources_L.shape)}, "
            f"{tuple(source_rows_XV.shape)}."
        )
    check_indices("row_gradient", "ids", ids_L, n_rows)
    check_indices("row_gradient", "sources", sources_L, len(source_rows_XV))
    sums = torch.promote_types(source_rows_XV.dtype, torch.float32)
    return RowGradient(
        n_rows,
        read_segments(ids_L, n_rows),
        coefficients_L.to(sums).contiguous(),
        sources_L.int().contiguous(),
        source_rows_XV,
    )


def row_gradient_norm(gradient: RowGradient, *, backend: str = "auto") -> Float[Tensor, ""]:
    """Returns the L2 norm over all rows, a scalar in the dtype of the coefficients, without a host synchronisation."""
    return cast("Tensor", _implementation("row_gradient_norm", gradient, backend)(gradient))


def row_gradient_squares(
    gradient: RowGradient, weights_V: Float[Tensor, " V"] | None = None, *, backend: str = "auto"
) -> Float[Tensor, " U"]:
    """Returns the sum of g**2 over the columns of each row that was read, where g is its gradient before `scale`.

    Where the columns of a table are sharded over ranks, the sums of the ranks are added and divided by the width of
    the whole row; the result is the argument `mean_squares_U` of `row_update`.

    Args:
        gradient: the reads of the step.
        weights_V: weight of each column in the sum, as `RowRule.column_weights` gives them, in the dtype of the
            coefficients; None: all are 1.
        backend: `auto`, `eager`, `cpu`, `triton` or `reference`.

    Returns:
        One sum per element of `gradient.segments.rows_U`, in the dtype of the coefficients; zero for padding (-1).

    Raises:
        ValueError: an unknown backend, or one that cannot sum in float64.
    """
    return cast("Tensor", _implementation("row_gradient_squares", gradient, backend)(gradient, weights_V))


def row_gradient_dots(
    table_NV: Float[Tensor, "N V"], gradient: RowGradient, *, backend: str = "auto"
) -> Float[Tensor, " L"]:
    """Returns `<table[n], source_rows[sources[l]]>` for each read l of a row n: the gradients of the coefficients.

    For a weighted gather these are the gradients of its weights. The `cpu` backend reads each row once for all of its
    reads, in ascending order, and keeps the squares of `row_gradient_squares` from the same pass.

    Args:
        table_NV: the table that was read, contiguous, in the dtype of the source rows.
        gradient: the reads of a backward pass.
        backend: `auto`, `eager`, `cpu` or `reference`.

    Returns:
        One number per read, in their order before the sort, in the dtype of the coefficients.

    Raises:
        ValueError: the table does not fit, or an unknown backend.
    """
    if table_NV.shape != (gradient.n_rows, gradient.source_rows_XV.shape[1]) or (
        table_NV.dtype is not gradient.source_rows_XV.dtype or not table_NV.is_contiguous()
    ):
        raise ValueError(
            f"row_gradient_dots: the table is {table_NV.dtype} of shape {tuple(table_NV.shape)}; the gradient needs a "
            f"contiguous one of {gradient.source_rows_XV.dtype}, {gradient.n_rows} rows and "
            f"{gradient.source_rows_XV.shape[1]} values."
        )
    if backend == "triton" or (backend == "auto" and _default_backend(gradient) == "triton"):
        backend = "eager"
    with torch.no_grad():
        return cast("Tensor", _implementation("row_gradient_dots", gradient, backend)(table_NV, gradient))


def row_update(
    table_NV: Float[Tensor, "N V"],
    gradient: RowGradient,
    rule: RowRule,
    step: UpdateStep,
    state: Mapping[str, Tensor],
    *,
    scale: Tensor | float = 1.0,
    mean_squares_U: Float[Tensor, " U"] | None = None,
    column_sums: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    backend: str = "auto",
) -> None:
    """Updates the rows that were read and their entries of `state` in place; all other rows keep their values.

    Sums and the rule are computed in fp32 (fp64 for fp64 tables), and the reads of a row are added in their order. A
    bf16 table is rounded stochastically, so that updates below its last bit are not lost.

    Args:
        table_NV: fp32, fp64 or bf16.
        gradient: the reads of the step.
        rule: the row optimizer.
        step: the numbers of this update.
        state: the tensors of `new_state`, which each update changes.
        scale: factor on the gradient (clipping, averages): a number, or a scalar tensor; that of a GPU is copied for
            a table in host memory.
        mean_squares_U: for a rule that needs them, where the table holds only some of the columns: the mean of g**2,
            weighted by `rule.column_weights`, over the whole row, before `scale`, per element of
            `gradient.segments.rows_U`, in the dtype of the coefficients. None: the columns of the table are the whole
            row.
        column_sums: for a rule that needs them, where the table is a part of a larger one: returns from the sums
            over these rows of these columns (V,) those over all rows, and their mean over all columns. Called once,
            also where nothing was read. None: the table is whole.
        backend: `auto`, `eager`, `cpu`, `triton` or `reference`. `auto` takes `eager` for a rule without a kernel.

    Raises:
        ValueError: a dtype, shape or state that does not fit, `mean_squares_U` for a rule that needs none, or a backend
            that is unknown or has no kernel for the rule.
    """
    if table_NV.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"row_update: the table is {table_NV.dtype}; allowed: torch.float32, float64, bfloat16.")
    if gradient.source_rows_XV.dtype is not table_NV.dtype or gradient.source_rows_XV.shape[1] != table_NV.shape[1]:
        raise ValueError(
            f"row_update: source rows are {gradient.source_rows_XV.dtype} of {gradient.source_rows_XV.shape[1]} "
            f"values, the table {table_NV.dtype} of {table_NV.shape[1]}; both need one dtype and width."
        )
    check_state(rule, state, table_NV)
    if gradient.n_rows != len(table_NV):
        raise ValueError(f"row_update: the gradient is of a table of {gradient.n_rows} rows, this has {len(table_NV)}.")
    if not table_NV.is_contiguous():
        raise ValueError("row_update: the table must be contiguous.")
    if mean_squares_U is not None:
        _check_mean_squares(mean_squares_U, gradient, rule)
    implementation = _implementation("row_update", gradient, _backend_for(rule, gradient, backend))
    if torch.is_tensor(scale):
        scale = scale.to(table_NV.device)
    with torch.no_grad():
        sums_V = implementation(table_NV, gradient, rule, step, state, scale, mean_squares_U)
        if rule.needs_column_sums:
            sums_V = cast("Tensor", sums_V)
            sums_V, mean = (sums_V, sums_V.mean()) if column_sums is None else column_sums(sums_V)
            rule.update_columns(state, sums_V, mean, step)


def _check_mean_squares(mean_squares_U: Tensor, gradient: RowGradient, rule: RowRule) -> None:
    if not rule.needs_mean_squares:
        raise ValueError(f"row_update: mean_squares_U is given to {rule.name}, which needs none; leave it out.")
    rows_U, coefficients_L = gradient.segments.rows_U, gradient.coefficients_L
    actual = tuple(mean_squares_U.shape), mean_squares_U.dtype, mean_squares_U.device
    expected = tuple(rows_U.shape), coefficients_L.dtype, rows_U.device
    if actual != expected:
        raise ValueError(
            f"row_update: mean_squares_U is {actual[1]} of shape {actual[0]} on {actual[2]}; this gradient needs "
            f"{expected[1]} of shape {expected[0]} on {expected[2]}, one number per element of its rows_U."
        )


def _backend_for(rule: RowRule, gradient: RowGradient, backend: str) -> str:
    """Returns `backend`, or `eager` where `auto` would take kernels that the rule lacks.

    Raises:
        ValueError: `backend` names kernels that the rule lacks.
    """
    if backend in _WITH_KERNELS and backend not in rule.kernels:
        raise ValueError(f"row_update: backend={backend!r} has no kernel for {rule.name}; use backend=eager.")
    if backend != "auto":
        return backend
    best = _default_backend(gradient)
    if best in _WITH_KERNELS and best not in rule.kernels:
        _announce_fallback(rule.name, best)
        return "eager"
    return best


# Cached, so that the log has one line per rule and backend, not one per step.
@functools.cache
def _announce_fallback(rule: str, backend: str) -> None:
    _log.info("row_update: %s has no kernel of the %s backend; its eager update runs instead", rule, backend)


def _default_backend(gradient: RowGradient) -> str:
    # The kernels sum in fp32.
    wide = gradient.source_rows_XV.dtype is torch.float64
    return "eager" if wide else best_backend(gradient.source_rows_XV)


def _implementation(name: str, gradient: RowGradient, backend: str) -> Callable[..., object]:
    """Returns `name` of the module of the backend: numba and triton are imported where they are first needed."""
    rows_XV = gradient.source_rows_XV
    if rows_XV.dtype is torch.float64 and backend in _WITH_KERNELS:
        raise ValueError(f"row_update: backend={backend!r} sums in float32; use backend=eager for float64 tables.")
    module = choose_backend("row_update", backend, _default_backend(gradient), _MODULES, rows_XV)()
    return cast("Callable[..., object]", getattr(module, name))


#: Backends of compiled kernels, which do not exist for every rule: see `RowRule.kernels`.
_WITH_KERNELS = ("cpu", "triton")
_MODULES = {
    name: (lambda module=f"{__name__}.{name}": importlib.import_module(module))
    for name in ("eager", "cpu", "triton", "reference")
}
