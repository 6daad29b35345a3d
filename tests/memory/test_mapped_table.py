"""A table that stays in a file: read as any other, never copied, never written to.

Letters: N rows, V values per row, T reads, K rows per read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import ValueTable

N, V, T, K = 50, 12, 7, 3


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def plain(request: pytest.FixtureRequest) -> ValueTable:
    return ValueTable(rows=N, dim=V).to(request.param)


@pytest.fixture
def mapped(plain: ValueTable, tmp_path: Path) -> ValueTable:
    """Maps the same table from a read-only file, in a module that is moved as a Trainer moves it."""
    path = tmp_path / "table"
    path.write_bytes(plain.weight.detach().view(torch.uint8).numpy().tobytes())
    path.chmod(0o400)
    weight_NV = MappedFile(path).tensor(0, plain.weight.dtype, (N, V))
    table = ValueTable(rows=N, dim=V, learning="rows", device="mmap")
    assert table.weight.is_meta
    table.load_state_dict({"weight": weight_NV})
    nn.Sequential(table).to("cpu").to(plain.weight.dtype).eval()
    assert table.weight.data_ptr() == weight_NV.data_ptr()
    return table


def test_a_mapped_table_reads_as_one_in_memory(plain: ValueTable, mapped: ValueTable) -> None:
    ids_TK, weights_TK = torch.randint(0, N, (T, K)), torch.randn(T, K)
    groups_TK, x_TV = torch.randint(0, 2, (T, K)), torch.randn(T, V)
    for table in (plain, mapped):
        table.weight.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(mapped(ids_TK, weights_TK), plain(ids_TK, weights_TK))
        assert torch.equal(mapped(ids_TK, weights_TK, groups_TK, 2), plain(ids_TK, weights_TK, groups_TK, 2))
        assert torch.equal(mapped.dot(x_TV, ids_TK), plain.dot(x_TV, ids_TK))
        assert torch.equal(mapped.gather(ids_TK), plain.gather(ids_TK))
    with pytest.raises(ValueError, match="ids has 50"):
        mapped(torch.full((T, K), N), weights_TK)


def test_weights_get_their_gradient_and_the_table_none(mapped: ValueTable) -> None:
    weights_TK = torch.randn(T, K, requires_grad=True)
    mapped(torch.randint(0, N, (T, K)), weights_TK).sum().backward()
    assert weights_TK.grad is not None
    assert mapped.weight.grad is None
    assert mapped.stage is None


def test_a_cast_is_refused_and_a_wrong_shape_too(mapped: ValueTable) -> None:
    with pytest.raises(ConfigError, match=r"reads the table as it was saved \(torch\.\w+\), not as torch\.float64"):
        nn.Sequential(mapped).double()
    with pytest.raises(RuntimeError, match="size mismatch"):
        ValueTable(rows=N, dim=V, device="mmap").load_state_dict({"weight": torch.zeros(N, V + 1)})
