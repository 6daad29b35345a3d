"""Attention against a loop over heads and positions; grouped queries, rotary positions, document masks.

Letters: H query heads, G key-value heads, C head dimension, F = C / 2.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.model.attention import Attention, AttentionInputs, document_mask
from pkm_lightning.model.rope import apply_rope, document_positions, rope_table

THETA = 100.0


def shared_inputs(positions_BT: Tensor, head_dim: int, mask_B1TT: Tensor | None = None) -> AttentionInputs:
    return AttentionInputs(*rope_table(positions_BT, head_dim, THETA), mask_B1TT)


def rotated(x_C: Tensor, position: int) -> Tensor:
    """Rotates the pairs (x[f], x[f + C/2]) as complex numbers by position * theta**(-2 f / C)."""
    half = len(x_C) // 2
    angles_F = torch.tensor([position * THETA ** (-2 * f / len(x_C)) for f in range(half)], dtype=torch.float64)
    turned_F = torch.complex(x_C[:half], x_C[half:]) * torch.polar(torch.ones_like(angles_F), angles_F)
    return torch.cat([turned_F.real, turned_F.imag])


def by_definition(attention: Attention, x_TD: Tensor, n_heads: int) -> Tensor:
    """Computes causal attention in float64, one head and one position at a time."""
    x_TD, size = x_TD.double(), attention.head_dim
    q_THC = (x_TD @ attention.query.weight.double().T).unflatten(-1, (-1, size))
    k_TGC = (x_TD @ attention.key.weight.double().T).unflatten(-1, (-1, size))
    v_TGC = (x_TD @ attention.value.weight.double().T).unflatten(-1, (-1, size))
    group = n_heads // k_TGC.shape[1]
    rows = []
    for t in range(len(x_TD)):
        heads = []
        for h in range(n_heads):
            q_C = rotated(q_THC[t, h], t)
            scores_T = torch.stack([q_C @ rotated(k_TGC[s, h // group], s) for s in range(t + 1)]) / math.sqrt(size)
            heads.append(scores_T.softmax(0) @ v_TGC[: t + 1, h // group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attention.out.weight.double().T


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (3, 1), (1, 1)])
def test_equals_the_definition_with_gradients(n_heads: int, n_kv_heads: int) -> None:
    attention = Attention(dim=24, n_heads=n_heads, n_kv_heads=n_kv_heads)
    x_BTD = torch.randn(1, 7, 24, requires_grad=True)
    y_BTD = attention(x_BTD, shared_inputs(torch.arange(7)[None], attention.head_dim))
    expected_TD = by_definition(attention, x_BTD[0], n_heads)
    assert_close(y_BTD[0], expected_TD)
    inputs = [x_BTD, *attention.parameters()]
    upstream_TD = torch.randn(7, 24)
    actual = torch.autograd.grad(y_BTD[0], inputs, upstream_TD)
    for grad, expected in zip(actual, torch.autograd.grad(expected_TD, inputs, upstream_TD.double()), strict=True):
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_equal_repeated_ones(masked: bool) -> None:
    grouped = Attention(dim=24, n_heads=6, n_kv_heads=2)
    full = Attention(dim=24, n_heads=6, n_kv_heads=6)
    state = grouped.state_dict()
    for name in ("key.weight", "value.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x_BTD = torch.randn(2, 5, 24)
    mask_B1TT = document_mask(torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 4, 4]])) if masked else None
    shared = shared_inputs(torch.arange(5)[None], 4, mask_B1TT)
    assert_close(grouped(x_BTD, shared), full(x_BTD, shared))


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q_BHTC, k_BHTC = torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 6, 8)
    scores = {}
    for shift in (0, 11):
        table = rope_table(torch.arange(6)[None] + shift, 8, THETA)
        scores[shift] = (apply_rope(q_BHTC, *table) @ apply_rope(k_BHTC, *table).transpose(-1, -2))[0, 0]
    assert_close(scores[0], scores[11])
    for distance in range(-5, 6):
        diagonal = scores[0].diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0][0, 0], scores[0][1, 0])


def test_rotation_keeps_norms_and_dtype_and_leaves_position_zero_alone() -> None:
    x_BHTC = torch.randn(2, 3, 4, 6)
    turned_BHTC = apply_rope(x_BHTC, *rope_table(torch.arange(4)[None], 6, THETA))
    assert_close(turned_BHTC.norm(dim=-1), x_BHTC.norm(dim=-1))
    assert torch.equal(turned_BHTC[:, :, 0], x_BHTC[:, :, 0])
    assert apply_rope(x_BHTC.bfloat16(), *rope_table(torch.arange(4)[None], 6, THETA)).dtype is torch.bfloat16


def test_positions_restart_with_every_document() -> None:
    doc_ids_BT = torch.tensor([[7, 7, 7, 2, 2, -1], [0, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5]])
    expected_BT = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    assert torch.equal(document_positions(doc_ids_BT), expected_BT)


def test_document_mask_is_causal_within_documents() -> None:
    doc_ids_BT = torch.tensor([[4, 4, 9, 9, 9], [1, 2, 2, -1, -1]])
    mask_B1TT = document_mask(doc_ids_BT)
    for b, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
        allowed = key <= query and doc_ids_BT[b, query] == doc_ids_BT[b, key]
        assert bool(mask_B1TT[b, 0, query, key]) == bool(allowed)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 4, 4), r"model.dim=10 is not divisible by model.n_heads=4; allowed, each with .*: 1, 5\."),
        ((12, 6, 4), r"model.n_heads=6 is not divisible by model.n_kv_heads=4; allowed: 1, 2, 3, 6\."),
        ((12, 4, 5), r"model.n_heads=4 is not divisible by model.n_kv_heads=5; allowed: 1, 2, 4\."),
        ((12, 0, 1), r"model.n_heads=0 is out of range"),
        ((12, 4, 0), r"model.n_kv_heads=0 is out of range"),
        ((12, 4, 4), r"gives the odd head dimension 3; rotary positions need an even one; allowed, each"),
        ((32, 7, 2), r"model.n_heads=7; allowed with model.n_kv_heads=2: 2, 4, 8, 16\."),
        ((9, 2, 1), r"an odd dimension cannot be divided into even head dimensions"),
    ],
)
def test_refuses_wrong_sizes(sizes: tuple[int, int, int], message: str) -> None:
    dim, n_heads, n_kv_heads = sizes
    with pytest.raises(ConfigError, match=message):
        Attention(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 4])
def test_every_suggested_number_of_heads_is_accepted(n_kv_heads: int) -> None:
    with pytest.raises(ConfigError) as refused:
        Attention(dim=48, n_heads=7, n_kv_heads=n_kv_heads)
    suggested = [int(number) for number in str(refused.value).rpartition(": ")[2].rstrip(".").split(", ")]
    assert len(suggested) > 2
    for n_heads in suggested:
        Attention(dim=48, n_heads=n_heads, n_kv_heads=n_kv_heads)
