"""One linear map a group of rows: the arithmetic of a mixture of experts.

Letters: M rows, E groups, I values in, O values out.
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
    """Rows sorted by group: the first `counts[0]` rows times `weight[0]`, the next `counts[1]` times `weight[1]`, ...

    Differentiable in the rows and in the weights; a group without rows gives its weight a zero gradient. Under
    autocast rows and weights are cast to its dtype, as a matmul's operands are.

    Args:
        x_MI: the rows.
        weight_EIO: one matrix a group, of the dtype of the rows.
        counts_E: int32 or int64 rows a group; they must add up to M, which only the loop can check.
        backend: `auto` (`grouped_mm` for bf16 on CUDA where it can, else `loop`), `loop` (a matmul a group, any
            device) or `grouped_mm` (torch's own).

    Raises:
        ValueError: shapes, dtypes or counts that do not fit, an unknown backend, or `grouped_mm` where it cannot.
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
    default = "grouped_mm" if x_MI.is_cuda and x_MI.dtype is torch.bfloat16 and not reason else "loop"
    return choose_backend("grouped_linear", backend, default, _BACKENDS, x_MI)(x_MI, weight_EIO, counts_E)


def _as_autocast(x: Tensor) -> Tensor:
    # torch knows no autocast of the meta device; like autocast itself, float64 is left alone.
    if x.is_meta or x.dtype is torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
