"""weighted_gather and gathered_dot as operators: registration, one graph, FLOPs, only the gradients that are needed.

Letters: G groups per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import gathered_dot, weighted_gather

FLOPS = 2 * 5 * 3 * 7  # one product and one sum per value of all reads
Op = Callable[..., Tensor]


def inputs() -> dict[str, Tensor]:
    return {
        "table": torch.randn(11, 7, requires_grad=True),
        "x": torch.randn(5, 7, requires_grad=True),
        "weights": torch.rand(5, 3, requires_grad=True),
        "ids": torch.randint(11, (5, 3), dtype=torch.int32),
        "groups": torch.randint(2, (5, 3)),
    }


def ungrouped(tensors: dict[str, Tensor], backend: str) -> Tensor:
    return weighted_gather(tensors["table"], tensors["ids"], tensors["weights"], backend=backend)


def grouped(tensors: dict[str, Tensor], backend: str) -> Tensor:
    groups = {"groups_TK": tensors["groups"], "n_groups": 2}
    return weighted_gather(tensors["table"], tensors["ids"], tensors["weights"], **groups, backend=backend)


def dot(tensors: dict[str, Tensor], backend: str) -> Tensor:
    return gathered_dot(tensors["table"], tensors["x"], tensors["ids"], backend=backend)


CASES = [(ungrouped, "weights"), (grouped, "weights"), (dot, "x")]  # the op and its second differentiable input


@pytest.mark.parametrize("groups", [False, True])
def test_weighted_gather_is_registered_completely(groups: bool) -> None:
    tensors = inputs()
    arguments = tensors["table"], tensors["ids"], tensors["weights"]
    grouping: tuple[Any, ...] = (tensors["groups"], 2) if groups else (None, 1)
    library.opcheck(torch.ops.pkm_lightning.weighted_gather.default, (*arguments, *grouping, "eager"))
    frozen = arguments[0].detach(), *arguments[1:]
    backward = torch.ops.pkm_lightning.weighted_gather_backward.default
    upstream_TGV = torch.randn(5, grouping[1], 7)
    with torch.no_grad():
        library.opcheck(backward, (*(part.detach() for part in frozen), grouping[0], upstream_TGV, "eager", True, True))


def test_gathered_dot_is_registered_completely() -> None:
    tensors = inputs()
    arguments = tensors["table"], tensors["x"], tensors["ids"]
    library.opcheck(torch.ops.pkm_lightning.gathered_dot.default, (*arguments, "eager"))
    frozen = (part.detach() for part in arguments)
    backward = torch.ops.pkm_lightning.gathered_dot_backward.default
    library.opcheck(backward, (*frozen, torch.randn(5, 3), "eager", True, True))


@pytest.mark.parametrize(
    ("op", "second", "backend"),
    [(ungrouped, "weights", "cpu"), (grouped, "weights", "eager"), (dot, "x", "cpu")],
)
def test_one_graph_gives_the_same_bits(op: Op, second: str, backend: str) -> None:
    tensors = inputs()

    def loss(table_NV: Tensor, other: Tensor) -> Tensor:
        return op(tensors | {"table": table_NV, second: other}, backend).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = tensors["table"], tensors[second]
    for grad, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize(("op", "second"), CASES)
def test_only_needed_gradients_are_computed_and_counted(op: Op, second: str) -> None:
    for frozen, sums in ((None, 3), ("table", 2), (second, 2)):
        tensors = inputs()
        if frozen is not None:
            tensors[frozen] = tensors[frozen].detach()
        with FlopCounterMode(display=False) as counter:
            op(tensors, "eager").sum().backward()
        assert counter.get_total_flops() == sums * FLOPS
        assert {name for name in ("table", second) if tensors[name].grad is not None} == {"table", second} - {frozen}


def largest_allocation(run: Callable[[], object]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("op", [ungrouped, grouped, dot])
def test_gathered_rows_are_never_held(op: Op, backend: str) -> None:
    tokens, per_token, dim = 32, 16, 64
    tensors = {
        "table": torch.randn(20, dim, requires_grad=True),
        "x": torch.randn(tokens, dim, requires_grad=True),
        "weights": torch.rand(tokens, per_token, requires_grad=True),
        "ids": torch.randint(20, (tokens, per_token)),
        "groups": torch.randint(2, (tokens, per_token)),
    }
    gathered = tokens * per_token * dim * 4
    op(tensors, backend).sum().backward()
    assert largest_allocation(lambda: op(tensors, backend).sum().backward()) < gathered / 4
    assert largest_allocation(lambda: op(tensors, "reference").sum().backward()) >= gathered
