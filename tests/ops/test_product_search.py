"""product_search against half_topk and product_combine of the references, with few and many values per set of keys.

Letters: Y sets of sub-keys: H, or 1 that all heads share; F dimension of a half key; 2 is the two halves.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close, assert_same_gradients
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import product_search

# Tokens, heads, sets, sub-keys, dimension, slots: the default layer, shared sub-keys, odd sizes, k = S, k above S, one
# of each, no token, more than a span of candidates.
SIZES = [
    (9, 2, 2, 256, 16, 8),
    (5, 3, 1, 70, 7, 5),
    (3, 1, 1, 9, 24, 9),
    (4, 2, 2, 5, 4, 11),
    (1, 1, 1, 1, 1, 1),
    (0, 2, 2, 5, 4, 2),
    (2, 2, 2, 300, 10, 40),
]
Sizes = tuple[int, int, int, int, int, int]


def inputs(sizes: Sizes, backend: str = "cpu", *, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Draws queries and keys: normal, or of few levels that products and sums keep exactly, so that many tie."""
    tokens, heads, sets, n_keys, dim, _ = sizes
    shapes = (tokens, heads, 2, dim), (sets, 2, n_keys, dim)
    drawn = (torch.randn(s) if steps is None else torch.randint(-steps, steps + 1, s) / 4 for s in shapes)
    q_TH2F, keys_Y2SF = (part.to(device_of(backend)).requires_grad_() for part in drawn)
    return q_TH2F, keys_Y2SF


@pytest.fixture(params=[2**14, 0], ids=["query by query", "chunks"])
def _few_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pkm_lightning.ops.product_search.cpu")
    monkeypatch.setattr(module, "_FEW_VALUES", request.param)


@pytest.mark.usefixtures("_few_values")
@pytest.mark.parametrize(("sizes", "dtype"), [*itertools.product(SIZES, [torch.float32, torch.float64])])
def test_scores_slots_and_gradients_equal_the_reference(sizes: Sizes, dtype: torch.dtype) -> None:
    operands = [part.detach().to(dtype).requires_grad_() for part in inputs(sizes)]
    scores_THK, ids_THK = product_search(*operands, sizes[-1], backend="cpu")
    expected_THK, expected_ids_THK = product_search(*operands, sizes[-1], backend="reference")
    assert (scores_THK.dtype, ids_THK.dtype) == (dtype, torch.int32)
    assert_close(scores_THK, expected_THK)
    # Rounding may exchange slots whose scores are closer than it.
    assert (ids_THK == expected_ids_THK).float().mean() > 0.99 or not sizes[0]
    if sizes[0] and torch.equal(ids_THK, expected_ids_THK):
        assert_same_gradients(scores_THK, expected_THK, dict(zip(("q", "keys"), operands, strict=True)))


@pytest.mark.usefixtures("_few_values")
def test_equal_scores_have_one_order_and_no_thread_changes_a_bit() -> None:
    operands = inputs((40, 2, 2, 70, 5, 12), steps=3)
    upstream_THK = torch.randn(40, 2, 12)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            scores_THK, ids_THK = product_search(*operands, 12)
            runs.append((scores_THK, ids_THK, *torch.autograd.grad(scores_THK, operands, upstream_THK)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    expected_THK, expected_ids_THK = product_search(*operands, 12, backend="reference")
    assert torch.equal(runs[0][1], expected_ids_THK)
    assert torch.equal(runs[0][0], expected_THK)


@pytest.mark.usefixtures("_few_values")
def test_nan_and_infinities_rank_as_in_the_reference() -> None:
    q_TH2F, keys_Y2SF = inputs((3, 1, 1, 60, 2, 6), steps=3)
    with torch.no_grad():
        q_TH2F[...] = 1
        keys_Y2SF[0, 0, 7], keys_Y2SF[0, 1, 50], keys_Y2SF[0, :, 3, 0] = torch.nan, torch.inf, -torch.inf
    results = [product_search(q_TH2F, keys_Y2SF, 6, backend=backend) for backend in ("cpu", "reference")]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(*(scores_THK.nan_to_num(9) for scores_THK, _ in results))
    assert results[0][0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_in_any_layout(backend: str) -> None:
    operands = inputs((3, 2, 2, 9, 4, 3), backend)
    scores_THK, ids_THK = product_search(*operands, 3, backend=backend)
    strided = [part.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for part in operands]
    others_THK, other_ids_THK = product_search(*strided, 3, backend=backend)
    assert torch.equal(ids_THK, other_ids_THK)
    assert_close(others_THK, scores_THK)
    expected_THK, expected_ids_THK = product_search(*operands, 3, backend="reference")
    assert torch.equal(ids_THK, expected_ids_THK)
    assert_same_gradients(scores_THK, expected_THK, dict(zip(("q", "keys"), operands, strict=True)))


def test_the_operators_are_registered_completely_traced_and_counted() -> None:
    q_TH2F, keys_Y2SF = inputs((3, 2, 2, 9, 4, 3))
    ops = torch.ops.pkm_lightning
    library.opcheck(ops.product_search.default, (q_TH2F, keys_Y2SF, 3))
    sums_THK, _, chosen_THK, indices_TXJ = ops.product_search(q_TH2F.detach(), keys_Y2SF.detach(), 3)
    saved = (sums_THK, chosen_THK, indices_TXJ, q_TH2F.detach(), keys_Y2SF.detach())
    library.opcheck(ops.product_search_backward.default, (torch.randn(3, 2, 3), *saved))
    compiled = torch.compile(lambda *operands: product_search(*operands, 3)[0], backend="aot_eager", fullgraph=True)
    with FlopCounterMode(display=False) as counter:
        scores_THK, _ = product_search(q_TH2F, keys_Y2SF, 3)
        scores_THK.sum().backward()
    assert counter.get_total_flops() == 4 * 3 * 2 * 9 * 4 + 8 * 3 * 2 * 3 * 4
    assert torch.equal(compiled(q_TH2F, keys_Y2SF), scores_THK)


def test_refusals() -> None:
    q_TH2F, keys_Y2SF = inputs((3, 2, 2, 9, 4, 3))
    for queries, keys in ((q_TH2F[0], keys_Y2SF), (q_TH2F[..., :3], keys_Y2SF), (q_TH2F, keys_Y2SF.repeat(2, 1, 1, 1))):
        with pytest.raises(ValueError, match=r"needs queries \(T, H, 2, F\) and keys \(H or 1, 2, S, F\), got "):
            product_search(queries, keys, 3)
    with pytest.raises(ValueError, match=r"queries are torch\.bfloat16 and keys torch\.float32; both need "):
        product_search(q_TH2F.bfloat16(), keys_Y2SF, 3)
    with pytest.raises(ValueError, match=r"product_search: k=82 is out of range; allowed: 1 to 81 "):
        product_search(q_TH2F, keys_Y2SF, 82)
