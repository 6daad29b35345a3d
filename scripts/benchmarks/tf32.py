"""Products of float32 as a GPU computes them in TF32, emulated in float32.

TF32 keeps 10 bits of a float32's mantissa; the products are exact and their sums are float32. A number x is split into
high = tf32(x) and low = tf32(x - high). `tf32x3` adds high * high, high * low and low * high, and leaves out low * low.
How the matrix units round within a sum is not documented: here it is the order and the rounding of the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32x3", "tf32")
#: A product of two numbers in `tf32x3` differs from the exact one by at most this share of it: high is within 2**-11 of
#: a number and high + low within 2**-22, and low * low, which is left out, is at most 2**-22.
TF32X3_ERROR = 3 * 2.0**-22


def tf32(x: Tensor) -> Tensor:
    """Rounds float32 to the nearest TF32, ties away from zero, as Triton does (`cvt.rna.tf32.f32`)."""
    # Half a unit of the last place that stays, added to the bits, carries into the exponent where it must.
    return ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Multiplies float32 matrices."""
    if precision == "ieee":
        return a @ b
    high_a, high_b = tf32(a), tf32(b)
    if precision == "tf32":
        return high_a @ high_b
    low_a, low_b = tf32(a - high_a), tf32(b - high_b)
    return low_a @ high_b + high_a @ low_b + high_a @ high_b
