"""RMSNorm of equal parts of vectors, and inner products of two vectors whose parts are normalised.

Letters: G equal parts of a vector.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.rms_norm import eager, operator, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

_KERNELS = ("cpu", "triton")
_NORMS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(operator.norm, backend=name) for name in _KERNELS},
    "eager": eager.norm,
    "reference": reference.norm,
}
_DOTS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(operator.dot, backend=name) for name in _KERNELS},
    "eager": eager.dot,
    "reference": reference.dot,
}

__all__ = ["rms_norm", "rms_norm_dot"]


def rms_norm(
    x_TD: Float[Tensor, "*T D"], gain_D: Float[Tensor, " D"], *, groups: int, eps: float, backend: str = "auto"
) -> Float[Tensor, "*T D"]:
    """Computes `x / sqrt(mean(x**2) + eps)` of each of `groups` equal parts of the last dimension, times `gain`.

    Differentiable in `x` and `gain`. Computed in fp32 at least, and rounded once to the dtype of `x`.

    Args:
        x_TD: the vectors.
        gain_D: the gains, of any floating dtype.
        groups: parts with a mean square of their own; divides D.
        eps: added to the mean square.
        backend: `auto`, `cpu` (numba), `triton`, `eager` (torch) or `reference` (part by part).

    Raises:
        ValueError: shapes or dtypes do not fit, or the backend is unknown.
    """
    _check("rms_norm", (x_TD,), gain_D, groups)
    implementation = choose_backend("rms_norm", backend, best_backend(x_TD), _NORMS, x_TD)
    return implementation(x_TD, gain_D, groups, eps)


def rms_norm_dot(
    x_TD: Float[Tensor, "*T D"],
    y_TD: Float[Tensor, "*T D"],
    gain_D: Float[Tensor, " D"],
    *,
    groups: int,
    eps: float,
    backend: str = "auto",
) -> Float[Tensor, "*T G"]:
    """Computes the inner products `<gain * RMSNorm(x), RMSNorm(y)>` of each of `groups` equal parts.

    Differentiable in `x`, `y` and `gain`, which is the product of the gains of both norms. The result is fp32, or fp64
    if `x` is. Arguments and errors are those of `rms_norm`.
    """
    _check("rms_norm_dot", (x_TD, y_TD), gain_D, groups)
    implementation = choose_backend("rms_norm_dot", backend, best_backend(x_TD), _DOTS, x_TD)
    return implementation(x_TD, y_TD, gain_D, groups, eps)


def _check(op: str, vectors: tuple[Tensor, ...], gain_D: Tensor, groups: int) -> None:
    shape, dim = vectors[0].shape, vectors[0].shape[-1]
    if any(x_TD.shape != shape for x_TD in vectors) or gain_D.shape != (dim,) or groups < 1 or dim % groups:
        raise ValueError(
            f"{op}: needs vectors of one shape (..., D), gains (D,) and groups that divide D, got "
            f"{', '.join(str(tuple(x_TD.shape)) for x_TD in vectors)}, {tuple(gain_D.shape)} and groups={groups}."
        )
    dtypes = [x.dtype for x in (*vectors, gain_D)]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"{op}: needs vectors and gains of floating dtypes, got {', '.join(map(str, dtypes))}.")
