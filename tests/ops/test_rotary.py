"""Every backend of rotary against the definition and against torch's operations, bit for bit.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import rotary

# Sequences, tokens, heads, values: usual ones, a pair, odd numbers of pairs, no token, no sequence.
SIZES = [(3, 7, 2, 16), (2, 1, 3, 2), (1, 5, 1, 34), (2, 4, 2, 6), (2, 0, 2, 4), (0, 3, 2, 4)]


def inputs(sizes: tuple[int, int, int, int], *, own_angles: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, C = sizes
    angles_ITF = torch.randn(B if own_angles else 1, T, C // 2)
    return torch.randn(B, T, H, C).requires_grad_(), angles_ITF.cos(), angles_ITF.sin()


@pytest.mark.parametrize(("sizes", "own_angles"), [*itertools.product(SIZES, [True, False])])
def test_values_and_gradients_are_those_of_torch_bit_for_bit(
    sizes: tuple[int, int, int, int], own_angles: bool
) -> None:
    x_BTHC, cos_ITF, sin_ITF = inputs(sizes, own_angles=own_angles)
    upstream_BTHC = torch.randn(x_BTHC.shape)
    results = []
    for backend in ("cpu", "eager"):
        y_BTHC = rotary(x_BTHC, cos_ITF, sin_ITF, backend=backend)
        results.append((y_BTHC, *torch.autograd.grad(y_BTHC, x_BTHC, upstream_BTHC)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    wide = [part.detach().double() for part in (x_BTHC, cos_ITF, sin_ITF)]
    assert_close(results[0][0], rotary(*wide, backend="reference"))


def test_strided_inputs_half_precision_and_one_graph() -> None:
    x_BTHC, cos_ITF, sin_ITF = inputs((2, 5, 3, 8))
    expected_BTHC = rotary(x_BTHC, cos_ITF, sin_ITF)
    strided = [part.detach().transpose(1, -1).contiguous().transpose(1, -1) for part in (x_BTHC, cos_ITF, sin_ITF)]
    assert torch.equal(rotary(*strided), expected_BTHC)
    half_BTHC = rotary(x_BTHC.bfloat16(), cos_ITF, sin_ITF)
    assert torch.equal(half_BTHC, rotary(x_BTHC.bfloat16().float(), cos_ITF, sin_ITF).bfloat16())
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_BTHC, cos_ITF, sin_ITF), expected_BTHC)
    assert rotary(*(part.to("meta") for part in (x_BTHC, cos_ITF, sin_ITF))).shape == x_BTHC.shape


def test_the_operator_is_registered_completely() -> None:
    library.opcheck(torch.ops.pkm_lightning.rotary.default, (*inputs((2, 3, 2, 4)), False))


def test_refusals() -> None:
    x_BTHC, cos_ITF, sin_ITF = inputs((2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"an even C, and angles .*, got \(2, 3, 2, 3\), "):
        rotary(x_BTHC[..., :3], cos_ITF, sin_ITF)
    with pytest.raises(ValueError, match=r"got \(2, 3, 2, 4\), \(2, 2, 2\) and \(2, 2, 2\)\."):
        rotary(x_BTHC, cos_ITF[:, 1:], sin_ITF[:, 1:])
    with pytest.raises(
        ValueError, match=r"backend='cpu' takes torch\.float32, got torch\.float64 and torch\.float32\."
    ):
        rotary(x_BTHC.double(), cos_ITF, sin_ITF, backend="cpu")
