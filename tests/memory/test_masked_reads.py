"""Masked reads: what a model computes then is what it computes with zeros in those rows, which stay as they are.

Letters: N rows, V values per row, T reads, K lines per read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ffn.plugin_contract import Case, built, ids, run
from rank_group import Groups
from stored_files import stored
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.memory import Addressing, QuantizedTable, TableMesh, ValueTable, masked_reads, zero_reads
from pkm_lightning.memory.row_prefetch import RowPrefetcher
from pkm_lightning.model import Transformer
from pkm_lightning.ops import quantize_rows

CASES = [
    Case("memory"),
    Case("memory_plus"),
    Case("memory_plus", {"gate": "none", "value_projection": True, "value_dim": 9}, "map"),
    Case("pkm"),
    Case("peer"),
    Case("peer", {"glu": True}, "glu"),
    Case("ultramem", {"value_dim": 6}),
    Case("ultramem_v2", {"value_dim": 5}),
    Case("ple", {"value_dim": 5}),
    Case("stem"),
    Case("engram", {"row_dim": 5}),
]
MIXTURES = [Case("moe"), Case("moe", {"select": "after"}, "after"), Case("moe_expert_choice")]
N, V, T, K = 50, 12, 7, 3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_without_reads_is_one_with_empty_tables(case: Case) -> None:
    model = copy.deepcopy(built(case)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    empty = copy.deepcopy(model)
    for table in empty.value_tables:
        torch.nn.init.zeros_(table.weight)
    with torch.no_grad():
        whole = run(model, ids()).hidden_BTD
        with zero_reads(model.value_tables):
            read = run(model, ids()).hidden_BTD
        again = run(model, ids()).hidden_BTD
        expected = run(empty, ids()).hidden_BTD
    assert torch.equal(read, expected)
    assert torch.equal(again, whole)
    assert not torch.allclose(read, whole)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_slots_are_searched_only_for_reads_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of zeros need no slots, unless another mask or an observer asks for their ids."""
    model = copy.deepcopy(built(Case("memory_plus"))).eval()
    searches: list[int] = []
    search = Addressing.forward

    def counted(self: Addressing, *arguments: Any) -> Any:
        searches.append(1)
        return search(self, *arguments)

    monkeypatch.setattr(Addressing, "forward", counted)
    with torch.no_grad(), zero_reads(model.value_tables):
        quiet = run(model, ids()).hidden_BTD
        assert not searches
        with masked_reads(model.value_tables, keep_odd):
            assert torch.equal(run(model, ids()).hidden_BTD, quiet)
        per_forward = len(searches)
        assert torch.equal(run(model, ids(), observe=True).hidden_BTD, quiet)
    assert len(searches) == 2 * per_forward > 0


def keep_odd(ids_TK: Tensor) -> Tensor:
    return ids_TK % 2 == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_rows_are_rows_of_zeros(case: Case) -> None:
    model = copy.deepcopy(built(case)).eval()
    emptied = copy.deepcopy(model)
    with torch.no_grad():
        for table in emptied.value_tables:
            table.weight.view(table.rows, -1)[::2] = 0
        whole, expected = run(model, ids()).hidden_BTD, run(emptied, ids()).hidden_BTD
        with masked_rows(model):
            read = run(model, ids()).hidden_BTD
    assert torch.equal(read, expected)
    assert not torch.allclose(read, whole)
    assert torch.equal(run(model, ids()).hidden_BTD, whole)


@contextmanager
def masked_rows(model: Transformer) -> Iterator[None]:
    """Masks the even rows of every table."""
    with ExitStack() as stack:
        for table in model.value_tables:
            slices = table.slices
            stack.enter_context(masked_reads([table], lambda ids_TK, s=slices: ids_TK // s % 2 == 1))
        yield


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_a_masked_expert_gives_nothing_and_the_others_keep_their_weights(case: Case) -> None:
    model = copy.deepcopy(built(case)).eval()
    emptied = copy.deepcopy(model)
    experts = [module for module in model.modules() if isinstance(module, SwiGLUExperts)]
    with torch.no_grad():
        for module in emptied.modules():
            if isinstance(module, SwiGLUExperts):
                module.out[::2] = 0
        whole, expected = run(model, ids()).hidden_BTD, run(emptied, ids()).hidden_BTD
        with masked_reads(experts, keep_odd):
            read = run(model, ids()).hidden_BTD
    assert torch.equal(read, expected)
    assert not torch.allclose(read, whole)


def plain_table(folder: Path) -> ValueTable:
    return ValueTable(rows=N, dim=V)


def row_learning_table(folder: Path) -> ValueTable:
    return ValueTable(rows=N, dim=V, learning="rows")


def quantized_table(folder: Path) -> ValueTable:
    table, quantized = QuantizedTable(rows=N, dim=V, bits=8), quantize_rows(torch.randn(N, V), 8)
    table.load_state_dict({"codes": quantized.codes_NC, "scales": quantized.scales_NQ})
    return table


def streamed_table(folder: Path) -> ValueTable:
    return ValueTable(rows=N, dim=V, device="mmap", stored=stored(folder / "rows", torch.randn(N, V)))


@pytest.mark.parametrize("make", [plain_table, row_learning_table, quantized_table, streamed_table])
def test_every_kind_of_read_of_every_kind_of_table_is_masked(
    make: Callable[[Path], ValueTable], tmp_path: Path
) -> None:
    table = make(tmp_path)
    ids_TK, weights_TK = torch.randint(0, N, (T, K)), torch.randn(T, K)
    groups_TK, x_TV = torch.randint(0, 2, (T, K)), torch.randn(T, V)
    keeps_TK = keep_odd(ids_TK)
    assert 0 < keeps_TK.sum() < keeps_TK.numel()
    kept = weights_TK * keeps_TK
    factors_TK = torch.rand(T, K)
    expected = [
        table(ids_TK, kept),
        table.start(ids_TK, kept, groups_TK, 2)(),
        table.dot(x_TV, ids_TK) * keeps_TK,
        table.gather(ids_TK) * keeps_TK.unsqueeze(-1),
        table(ids_TK, kept * factors_TK),
    ]
    with masked_reads([table], keep_odd):
        read = [
            table(ids_TK, weights_TK),
            table.start(ids_TK, weights_TK, groups_TK, 2)(),
            table.dot(x_TV, ids_TK),
            table.gather(ids_TK),
        ]
        with masked_reads([table], lambda ids: factors_TK):
            read.append(table(ids_TK, weights_TK))
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
    assert table.masks == ()


def test_rows_that_were_fetched_ahead_are_masked_too(tmp_path: Path) -> None:
    table, ids_TK = streamed_table(tmp_path), torch.randint(0, N, (T, K))
    expected = table.gather(ids_TK) * keep_odd(ids_TK).unsqueeze(-1)
    prefetcher = RowPrefetcher(torch.device("cpu"))
    prefetcher.submit("loop", [table], lambda: {"layer": [(table, ids_TK)]}, ())
    assert prefetcher.find(table, ids_TK) is not None
    with masked_reads([table], keep_odd):
        assert torch.equal(table.gather(ids_TK), expected)
    prefetcher.end("loop")


def test_a_compiled_block_is_masked_and_compiled_no_second_time() -> None:
    model = copy.deepcopy(built(Case("memory"))).eval()
    counter = CompileCounterWithBackend("eager")
    for block in model.blocks:
        block.compile(backend=counter)
    with torch.no_grad():
        whole = run(model, ids()).hidden_BTD
        frames = counter.frame_count
        with masked_rows(model):
            masked = run(model, ids()).hidden_BTD
        again = run(model, ids()).hidden_BTD
    assert not torch.allclose(masked, whole)
    assert torch.equal(again, whole)
    assert counter.frame_count == frames > 0
    torch._dynamo.reset()


def test_rows_that_are_not_finite_are_not_read() -> None:
    table = ValueTable(rows=5, dim=3)
    torch.nn.init.constant_(table.weight, torch.nan)
    with zero_reads([table]):
        assert table(torch.tensor([[1, 2]]), torch.ones(1, 2)).tolist() == [[0.0, 0.0, 0.0]]
        assert table.dot(torch.ones(1, 3), torch.tensor([[4]])).tolist() == [[0.0]]


def test_an_error_ends_it_and_an_inner_block_does_not_end_the_outer_one() -> None:
    table, other = ValueTable(rows=5, dim=3), ValueTable(rows=5, dim=3)
    with zero_reads([table]):
        with pytest.raises(KeyError), zero_reads([table, other]):
            {}["missing"]
        assert (table.reads_zeros, other.reads_zeros) == (True, False)
    assert not table.reads_zeros


def sharded_reads(shard: str, enters: int) -> dict[str, Any]:
    """Reads a sharded table twice; only the rank `enters` reads zeros the first time, or all ranks if it is -1."""
    torch.manual_seed(0)
    mesh = TableMesh(shard=shard, members=2, device_type="cpu")
    table = ValueTable(rows=6, dim=4, mesh=mesh)
    ids_TK, weights_TK = torch.tensor([[0, 5], [3, 1]]), torch.ones(2, 2)

    def read() -> list[Tensor]:
        return [table(ids_TK, weights_TK), table.dot(torch.ones(2, 4), ids_TK), table.gather(ids_TK)]

    with torch.no_grad():
        silent = [table] if enters in (-1, torch.distributed.get_rank()) else []
        with zero_reads(silent):
            first = read()
        second = read()
        with masked_reads(silent, keep_odd):
            odd = read()
        keeps_TK = keep_odd(ids_TK) if silent else torch.ones(2, 2, dtype=torch.bool)
        masked = [table(ids_TK, weights_TK * keeps_TK), second[1] * keeps_TK, second[2] * keeps_TK.unsqueeze(-1)]
        return {
            "first": [bool(part.any()) for part in first],
            "second": [bool(part.any()) for part in second],
            "odd": [torch.equal(*pair) for pair in zip(odd, masked, strict=True)],
        }


@pytest.mark.parametrize("shard", ["dim", "row"])
@pytest.mark.parametrize("enters", [-1, 1])
def test_ranks_that_share_a_table_go_on_exchanging_reads(ranks: Groups, shard: str, enters: int) -> None:
    results = ranks(2).run(sharded_reads, shard, enters)
    for rank, result in enumerate(results):
        reads = enters not in (-1, rank)
        assert result == {"first": [reads] * 3, "second": [True] * 3, "odd": [True] * 3}
