"""Staged reads: they add up to the dense gradient of autograd, for every kind of read and any number of them.

Letters: N rows, V values per row, T reads, K rows per read, G groups per read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pkm_lightning.memory import RowStage, ValueTable, clip_tables
from pkm_lightning.ops.backends import HAS_NUMBA

N, V, T, K = 17, 6, 5, 4


class Reader(nn.Module):
    """Weights from the input, one read, by sum, by group, by inner products or row by row; several share a table."""

    def __init__(self, table: ValueTable, kind: str) -> None:
        super().__init__()
        self.tables, self.kind = [table], kind
        self.weights, self.mix = nn.Linear(V, K), nn.Linear(2 * V if kind == "groups" else V, V)

    def forward(self, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
        (table,) = self.tables
        weights_TK = self.weights(x_TV).softmax(-1)
        if self.kind == "sum":
            y_TV = table(ids_TK, weights_TK)
        elif self.kind == "rows":
            y_TV = (weights_TK.unsqueeze(-1) * table.gather(ids_TK)).sum(1)
        elif self.kind == "groups":
            y_TV = table(ids_TK, weights_TK, groups_TK=ids_TK % 2, n_groups=2).flatten(1)
        else:
            y_TV = table(ids_TK, table.dot(x_TV, ids_TK).tanh() * weights_TK)
        return self.mix(y_TV) + x_TV


def pair(kind: str, *, slices: int = 1) -> tuple[ValueTable, list[Reader], ValueTable, list[Reader]]:
    """Builds two layers over one table that learns densely, and the same by rows."""
    made = []
    for learning in ("dense", "rows"):
        torch.manual_seed(3)
        table = ValueTable(rows=N, dim=V, learning=learning, slices=slices)
        made.append((table, [Reader(table, kind), Reader(table, kind)]))
    return *made[0], *made[1]


def run(layers: list[Reader], through: Callable[..., Tensor] | None = None) -> None:
    """Runs two micro-batches forward through both layers and backward, on the same numbers each time."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        x_TV = torch.randn(T, V, generator=generator)
        for layer in layers:
            ids_TK = torch.randint(N, (T, K), generator=generator)
            x_TV = layer(x_TV, ids_TK) if through is None else through(layer, x_TV, ids_TK)
        x_TV.square().sum().backward()


def dense(stage: RowStage, table: ValueTable) -> Tensor:
    """Returns the staged gradient as N x V numbers."""
    gradient = stage.gradient(table.weight)
    assert gradient is not None
    _, (order_L, rows_U, starts_Z), coefficients_L, sources_L, rows_XV = gradient
    grad_NV = torch.zeros_like(table.weight)
    for row, start, end in zip(rows_U.tolist(), starts_Z[:-1].tolist(), starts_Z[1:].tolist(), strict=True):
        for read in order_L[start:end].tolist():
            grad_NV[row] += coefficients_L[read] * rows_XV[sources_L[read]]
    return grad_NV.view_as(table.weight)


def staged(table: ValueTable) -> RowStage:
    assert table.stage is not None
    return table.stage


@pytest.mark.parametrize("kind", ["sum", "groups", "dot", "rows"])
def test_two_layers_and_two_micro_batches_add_up_to_the_dense_gradient(kind: str) -> None:
    dense_table, dense_layers, table, layers = pair(kind)
    run(dense_layers)
    run(layers)
    assert table.weight.grad is None
    assert dense_table.weight.grad is not None
    assert_close(dense(staged(table), table), dense_table.weight.grad, kind="grad")
    for own, expected in zip(layers, dense_layers, strict=True):
        for p, q in zip(own.parameters(), expected.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert_close(p.grad, q.grad, kind="grad")


@pytest.mark.parametrize("kinds", [("rows", "sum"), ("sum", "rows"), ("rows", "dot", "rows")])
def test_reads_of_several_kinds_of_one_table_add_up(kinds: tuple[str, ...]) -> None:
    dense_table, _, table, _ = pair("sum")
    torch.manual_seed(3)
    of_both = [Reader(dense_table, kind) for kind in kinds]
    run(of_both)
    for layer in of_both:
        layer.tables = [table]
    run(of_both)
    assert dense_table.weight.grad is not None
    assert_close(dense(staged(table), table), dense_table.weight.grad, kind="grad")


def test_rows_read_one_by_one_are_staged_without_coefficients_and_sources() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows")
    for length in (T, 2 * T):  # a longer step, and then a shorter one, use what the first has left
        staged(table).clear()
        ids_TK, upstream_TKV = torch.randint(N, (length, K)), torch.randn(length, K, V)
        table.gather(ids_TK).backward(upstream_TKV)
        stage = staged(table)
        assert (stage._ids.length, stage._rows.length) == (length * K, length * K)
        assert (stage._coefficients.length, stage._sources.length) == (0, 0)
        expected_NV = torch.zeros(N, V).index_add_(0, ids_TK.flatten(), upstream_TKV.flatten(0, 1))
        assert_close(dense(stage, table), expected_NV)
    staged(table).clear()
    table.gather(ids_TK[:2]).backward(upstream_TKV[:2])
    expected_NV = torch.zeros(N, V).index_add_(0, ids_TK[:2].flatten(), upstream_TKV[:2].flatten(0, 1))
    assert_close(dense(staged(table), table), expected_NV)


def test_what_backward_has_computed_serves_the_step_until_more_is_staged() -> None:
    table, ids_TK = ValueTable(rows=N, dim=V, learning="rows"), torch.randint(N, (T, K))
    stage, weights_TK = staged(table), torch.rand(T, K, requires_grad=True)
    table(ids_TK, weights_TK).square().sum().backward()
    first = stage.gradient(table.weight)
    assert first is not None
    if HAS_NUMBA:
        assert "cpu_squares_U" in first.shared
    assert_close(stage.norm(table.weight), dense(stage, table).norm(), kind="grad")
    assert weights_TK.grad is not None
    alone_NV, alone_TK = dense(stage, table).clone(), weights_TK.grad.clone()
    table(ids_TK, weights_TK).square().sum().backward()
    assert stage.gradient(table.weight) is not first
    assert_close(dense(stage, table), 2 * alone_NV, kind="grad")
    assert_close(stage.norm(table.weight), 2 * alone_NV.norm(), kind="grad")
    # The second read was not sorted in backward.
    assert_close(weights_TK.grad, 2 * alone_TK, kind="grad")
    # Only some lines learn: the reads of the others must not be in what is taken over, nor in the norm.
    stage.clear()
    stage.restrict(torch.tensor([int(ids_TK[0, 0])]))
    table(ids_TK, weights_TK).square().sum().backward()
    restricted_NV = dense(stage, table)
    assert restricted_NV.count_nonzero(dim=1).count_nonzero() == 1
    assert_close(stage.norm(table.weight), restricted_NV.norm(), kind="grad")


def test_a_forward_that_is_recomputed_stages_once() -> None:
    dense_table, dense_layers, table, layers = pair("sum")
    run(dense_layers)
    run(layers, lambda layer, *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    assert dense_table.weight.grad is not None
    assert_close(dense(staged(table), table), dense_table.weight.grad, kind="grad")


@pytest.mark.parametrize("kind", ["sum", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dot", "rows"))])
def test_compiled_layers_stage_the_same(kind: str) -> None:
    dense_table, dense_layers, table, layers = pair(kind)
    run(dense_layers)
    run([torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in layers])  # type: ignore[misc]
    assert dense_table.weight.grad is not None
    assert_close(dense(staged(table), table), dense_table.weight.grad, kind="grad")


def test_a_compiler_does_not_merge_two_equal_reads() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows")
    ids_TK, weights_TK = torch.randint(N, (T, K)), torch.rand(T, K)

    def twice() -> Tensor:
        return (table(ids_TK, weights_TK) + table(ids_TK, weights_TK)).sum()

    twice().backward()
    expected_NV = dense(staged(table), table)
    staged(table).clear()
    torch.compile(twice, backend="aot_eager", fullgraph=True)().backward()
    assert_close(dense(staged(table), table), expected_NV)


def test_one_compiled_graph_serves_many_tables() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    for _ in range(4):
        layer = Reader(ValueTable(rows=N, dim=V, learning="rows"), "sum")
        torch.compile(layer, backend=count)(torch.randn(T, V), torch.randint(N, (T, K)))
    assert len(graphs) == 1


def test_backward_without_the_table_is_an_error() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows")
    y_TV = table(torch.randint(N, (T, K)), torch.rand(T, K))
    del table
    with pytest.raises(RuntimeError, match="the table of this read no longer exists"):
        y_TV.sum().backward()


def test_slices_of_rows_are_rows_of_their_own() -> None:
    table = ValueTable(rows=3, dim=4, slices=2, learning="rows")
    assert table.weight.shape == (6, 2)
    y_TV = table(torch.tensor([[5]]), torch.ones(1, 1))
    assert torch.equal(y_TV[0], table.weight[5])
    y_TV.backward(torch.tensor([[1.0, 2.0]]))
    assert dense(staged(table), table).flatten().nonzero().flatten().tolist() == [10, 11]


def test_a_read_with_constant_weights_is_staged_too() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows")
    table(torch.randint(N, (T, K)), torch.rand(T, K)).sum().backward()
    assert dense(staged(table), table).any()


def test_nothing_is_staged_without_gradient_or_for_frozen_rows() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows")
    with torch.no_grad():
        assert not table(torch.randint(N, (T, K)), torch.rand(T, K)).requires_grad
    assert staged(table).gradient(table.weight) is None
    assert staged(table).norm(table.weight).item() == 0
    frozen = ValueTable(rows=N, dim=V, learning="rows", trainable=False)
    assert frozen.stage is None
    assert not frozen.weight.requires_grad


def test_cleared_buffers_start_anew() -> None:
    _, _, table, layers = pair("sum")
    run(layers)
    once = dense(staged(table), table)
    staged(table).scale = 0.5
    staged(table).clear()
    run(layers)
    assert torch.equal(dense(staged(table), table), once)
    assert staged(table).scale == 1.0


def test_copies_of_a_model_stage_for_themselves() -> None:
    _, _, table, _ = pair("sum")
    other = copy.deepcopy(table)
    other(torch.randint(N, (T, K)), torch.rand(T, K)).sum().backward()
    assert staged(table).gradient(table.weight) is None
    assert staged(other).gradient(other.weight) is not None


def test_bf16_tables_keep_their_coefficients_in_fp32() -> None:
    table = ValueTable(rows=N, dim=V, learning="rows").bfloat16()
    table(torch.randint(N, (T, K)), torch.rand(T, K)).float().sum().backward()
    gradient = staged(table).gradient(table.weight)
    assert gradient is not None
    assert gradient.coefficients_L.dtype is torch.float32
    assert gradient.source_rows_XV.dtype is torch.bfloat16


def test_clipping_is_by_the_norm_over_all_tables() -> None:
    dense_table, dense_layers, table, layers = pair("sum")
    run(dense_layers)
    run(layers)
    other = ValueTable(rows=N, dim=V, learning="rows")
    other(torch.randint(N, (T, K)), torch.rand(T, K)).sum().backward()
    both, beside = [table, other], torch.ones(4)
    assert dense_table.weight.grad is not None
    expected = torch.stack([dense_table.weight.grad.norm(), dense(staged(other), other).norm(), beside.norm()]).norm()

    def norm() -> Tensor:
        return torch.stack([*(staged(one).norm(one.weight) for one in both), beside.norm()]).norm()

    assert_close(clip_tables(both, [beside], None), expected)
    assert [staged(one).scale for one in both] == [1.0, 1.0]
    assert_close(clip_tables(both, [beside], 0.5), expected)
    assert_close(norm(), torch.tensor(0.5))
    clip_tables(both, [beside], 100.0)
    assert_close(norm(), torch.tensor(0.5))


def test_a_table_in_host_memory_is_cast_but_not_moved() -> None:
    with torch.device("meta"):  # models of which only shapes are wanted
        assert ValueTable(rows=N, dim=V, device="cpu").weight.is_meta
    table = ValueTable(rows=N, dim=V, device="cpu")
    layer = nn.ModuleDict({"table": table, "linear": nn.Linear(2, 2)}).to("meta", torch.bfloat16)
    assert layer["linear"].weight.is_meta  # type: ignore[union-attr]
    assert table.weight.device.type == "cpu"
    assert table.weight.dtype is torch.bfloat16
