"""Scores of three TF32 products: their error against float64, and the keys that they choose.

Triton's interpreter multiplies in float32 whatever the precision, so the product of TF32 parts is put in its place. The
matrix units themselves were compared with float64 on a GPU: `pkm_lightning/ops/half_topk/README.md`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from tree import ROOT

from pkm_lightning.ops import half_topk

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulates a GPU in Triton's interpreter")
EPS = 2.0**-24


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes the interpreter multiply as `scripts/benchmarks/tf32.py` does; returns that module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("benchmarks.tf32")
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(_: Any, a: Any, b: Any, total: Any, input_precision: Any, *rest: Any) -> Any:
        precision = str(input_precision).rpartition(".")[2].lower()
        product = module.matmul(torch.from_numpy(a.data), torch.from_numpy(b.data), precision)
        return interpreter.TensorHandle(product.numpy() + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return module


def test_three_products_of_tf32_are_about_as_exact_as_float32(emulated: ModuleType) -> None:
    q_TF, keys_SF = torch.randn(9, 70), torch.randn(66, 70)
    exact_TS = q_TF.double() @ keys_SF.double().T
    size_TS = q_TF.double().abs() @ keys_SF.double().abs().T
    chosen = {}
    for precision, error in (("ieee", 0.0), ("tf32x3", emulated.TF32X3_ERROR)):
        values_TK, ids_TK = half_topk(q_TF, keys_SF, 5, precision=precision, backend="triton")
        # Each of the 70 additions rounds too.
        bound_TK = (size_TS * (error + 72 * EPS)).gather(1, ids_TK.long())
        assert ((values_TK - exact_TS.gather(1, ids_TK.long())).abs() <= bound_TK).all(), precision
        # A key that was not chosen is better by no more than both errors.
        best_TK = exact_TS.topk(5).values
        assert (best_TK - exact_TS.gather(1, ids_TK.long()) <= 2 * bound_TK.amax()).all(), precision
        chosen[precision] = values_TK, ids_TK
    assert torch.equal(chosen["ieee"][1], chosen["tf32x3"][1])
    assert not torch.equal(chosen["ieee"][0], chosen["tf32x3"][0])  # the emulation was used
    # The bound tells three products from one.
    single_TS = emulated.matmul(q_TF, keys_SF.T, "tf32")
    assert ((single_TS - exact_TS).abs() > size_TS * (emulated.TF32X3_ERROR + 72 * EPS)).float().mean() > 0.5


def test_ties_rank_by_key_in_three_products_too(emulated: ModuleType) -> None:
    # Quarters of small integers are TF32 numbers, whose low parts are zero.
    q_TF, keys_SF = (torch.randint(-3, 4, (rows, 5)) / 4 for rows in (6, 70))
    values_TK, ids_TK = half_topk(q_TF, keys_SF, 4, precision="tf32x3", backend="triton")
    expected_TK, expected_ids_TK = half_topk(q_TF, keys_SF, 4, backend="reference")
    assert torch.equal(values_TK, expected_TK)
    assert torch.equal(ids_TK, expected_ids_TK)
