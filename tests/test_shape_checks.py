"""shape_checks: wrong shapes are refused, a function's own error is raised, kernels and compiled code are unchanged."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import shape_checks
import torch
from jaxtyping import TypeCheckError

SOURCE = """
from __future__ import annotations
from typing import TYPE_CHECKING
import triton
if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

def matmul(x_TK: Float[Tensor, "T K"], y_KD: Float[Tensor, "K D"]) -> Float[Tensor, "T D"]:
    return x_TK @ y_KD

def positive(x_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    if x_N.ndim != 1:
        raise ValueError("positive: needs one dimension")
    return x_N.abs()

def firsts(x_N: Float[Tensor, " N"], k: int) -> Float[Tensor, " {k}"]:
    return x_N[: min(k, 3)]

class Layer:
    def forward(self, x_TK: Float[Tensor, "T K"]) -> Float[Tensor, " K"]:
        return x_TK

def positives(x_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return x_N[x_N > 0]

@triton.jit
def kernel(x_ptr: Float[Tensor, "never looked at"]):
    pass
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "shaped_example.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        patch.syspath_prepend(folder)
        shape_checks.install(("shaped_example",))
        yield importlib.import_module("shaped_example")
    del sys.modules["shaped_example"]
    assert not (Path(folder) / "__pycache__").exists(), "checked code must never be cached for other processes"


def test_correct_shapes_pass(module) -> None:
    assert module.matmul(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)


@pytest.mark.parametrize("y_KD", [torch.ones(5, 4), torch.ones(3), torch.ones(3, 4, dtype=torch.int64)])
def test_wrong_shape_or_dtype_is_refused(module, y_KD: torch.Tensor) -> None:
    with pytest.raises(TypeCheckError, match="y_KD"):
        module.matmul(torch.ones(2, 3), y_KD)


def test_wrong_result_is_refused(module) -> None:
    with pytest.raises(TypeCheckError, match="return"):
        module.Layer().forward(torch.ones(2, 3))


def test_a_call_like_earlier_ones_is_checked_for_its_own_result(module) -> None:
    for _ in range(2):
        assert module.positives(torch.ones(3)).shape == (3,)
        with pytest.raises(TypeCheckError, match="return"):
            module.positives(torch.eye(3)[0])
        with pytest.raises(TypeCheckError, match="x_N"):
            module.positives(torch.ones(3, dtype=torch.int64))


def test_a_number_that_is_a_dimension_counts(module) -> None:
    for k in (2, 3):
        assert len(module.firsts(torch.ones(5), k)) == k
    with pytest.raises(TypeCheckError):
        module.firsts(torch.ones(5), 4)


def test_the_error_of_the_function_itself_is_raised(module) -> None:
    with pytest.raises(ValueError, match="positive: needs one dimension"):
        module.positive(torch.ones(2, 2))


def test_compiled_code_is_one_graph(module) -> None:
    compiled = torch.compile(module.matmul, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)


def test_kernels_are_not_wrapped(module) -> None:
    assert module.kernel.fn.__name__ == "kernel"
    assert module.kernel.fn.__globals__ is vars(module)


def test_ops_and_memory_are_checked() -> None:
    from pkm_lightning.ops import weighted_gather
    from pkm_lightning.ops.segments import read_segments

    with pytest.raises(TypeCheckError, match="ids_L"):
        read_segments(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="weighted_gather"):
        weighted_gather(torch.ones(4, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1))
    assert weighted_gather.__wrapped__.__module__ == "pkm_lightning.ops.weighted_gather"


def test_a_late_installation_is_refused() -> None:
    with pytest.raises(RuntimeError, match="imported before"):
        shape_checks.install(("torch",))
