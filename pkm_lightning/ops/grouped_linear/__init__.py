"""A different linear map for each group of rows: the matrix products of a mixture of experts.

Letters: M rows (token copies sorted by expert), E groups, I values in, O values out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops.backends import choose_backend
from pkm_lightning.ops.grouped_linear.grouped import grouped_linear_grouped_mm, refusal
from pkm_lightning.ops.grouped_linear.loop import grouped_linear_loop

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_BACKENDS = {"loop": grouped_linear_loop, "grouped_mm": grouped_linear_grouped_mm}

__all__ = ["grouped_linear"]


def grouped_linear(
    x_MI: Float[Tensor, "M I"],
    weight_EIO: Float[Tensor, "E I O"],
    counts_E: Int[Tensor, " E"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "M O"]:
    """Multiplies the first `counts[0]` rows by `weight[0]`, the next `counts[1]` rows by `weight[1]`, and so on.

    Differentiable in rows and weights; the weight of a group without rows gets a zero gradient. Under autocast rows and
    weights are cast to its dtype, like the operands of a matmul.

    Args:
        x_MI: the rows, sorted by group.
        weight_EIO: one matrix per group, of the dtype of the rows.
        counts_E: int32 or int64 number of rows per group; they must add up to M, which only `loop` checks.
        backend: `auto` (`grouped_mm` for bf16 on CUDA where it can run, else `loop`), `loop` (one matmul per group, any
            device) or `grouped_mm` (torch's own).

    Raises:
        ValueError: shapes, dtypes or counts do not fit, the backend is unknown, or `grouped_mm` cannot take the
            operands.
    """
    if x_MI.ndim != 2 or weight_EIO.ndim != 3 or (*counts_E.shape, x_MI.shape[1]) != tuple(weight_EIO.shape[:2]):
        raise ValueError(
            "grouped_linear: needs rows (M, I), weights (E, I, O) and counts (E,), got "
            f"{tuple(x_MI.shape)}, {tuple(weight_EIO.shape)}, {tuple(counts_E.shape)}."
        )
    x_MI, weight_EIO = _as_autocast(x_MI), _as_autocast(weight_EIO)
    if x_MI.dtype is not weight_EIO.dtype:
        raise ValueError(f"grouped_linear: rows are {x_MI.dtype}, weights {weight_EIO.dtype}; both need one dtype.")
    reason = refusal(x_MI, weight_EIO)
    if backend == "grouped_mm" and reason:
        raise ValueError(f"grouped_linear: backend='grouped_mm' cannot run, {reason}; use auto or loop.")
    # Only bf16 on CUDA has a kernel; elsewhere torch loops itself, and more slowly than `loop` (README.md).
    default = "grouped_mm" if x_MI.is_cuda and x_MI.dtype is torch.bfloat16 and not reason else "loop"
    return choose_backend("grouped_linear", backend, default, _BACKENDS, x_MI)(x_MI, weight_EIO, counts_E)


def _as_autocast(x: Tensor) -> Tensor:
    # torch has no autocast on the meta device; float64 is left alone, as autocast itself does.
    if x.is_meta or x.dtype is torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
