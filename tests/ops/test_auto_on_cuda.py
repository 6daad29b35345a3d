"""`auto` on CUDA tensors takes a backend that the op has. Fake tensors, which have shapes only, need no GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pkm_lightning import ops
from pkm_lightning.ops import backends

pytestmark = pytest.mark.skipif(not backends.HAS_TRITON, reason="auto needs no Triton backend without triton")


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda")


def ids(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def quantized() -> ops.QuantizedRows:
    return ops.QuantizedRows(ids(9, 8, dtype=torch.uint8), floats(9, 1).bfloat16(), 8, 8)


CALLS: dict[str, Callable[[], Any]] = {
    "causal_convolution": lambda: ops.causal_convolution(floats(2, 5, 4), floats(4, 3), length=5, dilation=1),
    "count_reads": lambda: ops.count_reads(
        ids(10, dtype=torch.int64), ids(10, dtype=torch.int64), ids(10), ids(5, 2), floats(5, 2), None, 0
    ),
    "gathered_dot": lambda: ops.gathered_dot(floats(9, 8), floats(5, 8), ids(5, 2)),
    "gathered_rows": lambda: ops.gathered_rows(floats(9, 8), ids(5, 2)),
    "grouped_linear": lambda: ops.grouped_linear(floats(6, 8).bfloat16(), floats(3, 8, 8).bfloat16(), ids(3)),
    "half_topk": lambda: ops.half_topk(floats(5, 8), floats(9, 8), 2),
    "product_combine": lambda: ops.product_combine(floats(5, 2), ids(5, 2), floats(5, 2), ids(5, 2), 9, 2),
    "product_search": lambda: ops.product_search(floats(5, 2, 2, 8), floats(2, 2, 9, 8), 2),
    "product_topk": lambda: ops.product_topk(floats(5, 9), floats(5, 9), 2),
    "quantized_dot": lambda: ops.quantized_dot(quantized(), floats(5, 8), ids(5, 2)),
    "quantized_gather": lambda: ops.quantized_gather(quantized(), ids(5, 2), floats(5, 2)),
    "ranked_topk": lambda: ops.ranked_topk(floats(5, 9), 2),
    "rms_norm": lambda: ops.rms_norm(floats(5, 8), floats(8), groups=2, eps=1e-6),
    "rms_norm_dot": lambda: ops.rms_norm_dot(floats(5, 8), floats(5, 8), floats(8), groups=2, eps=1e-6),
    "rotary": lambda: ops.rotary(floats(2, 5, 3, 8), floats(2, 5, 4), floats(2, 5, 4)),
    "weighted_gather": lambda: ops.weighted_gather(floats(9, 8), ids(5, 2), floats(5, 2)),
}


def test_every_op_with_backends_is_called() -> None:
    functions = {name: getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert CALLS.keys() == {name for name, op in functions.items() if "backend" in inspect.signature(op).parameters}


class Choice(Exception):
    """Ends an op when it has chosen, since the kernels need a GPU."""


@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_a_backend_of_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(op: str, backend: str) -> None:
        raise Choice(backend)

    # `choose_backend` logs what it has chosen, and refuses before that.
    monkeypatch.setattr(backends, "_log_once", stop)
    with FakeTensorMode(), pytest.raises(Choice) as choice:
        CALLS[name]()
    if (Path(inspect.getfile(inspect.unwrap(getattr(ops, name)))).parent / "triton.py").exists():
        assert choice.value.args == ("triton",)
