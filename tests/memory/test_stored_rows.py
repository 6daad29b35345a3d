"""A table whose rows lie in a file: read from it or copied, it gives the bits of the same table in memory.

Letters: N rows, V values per row, T reads, K rows per read.
"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from memory.test_mesh import part_of
from stored_files import HUGE, stored, write_huge

from pkm_lightning.build.model import weight_dtype
from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.errors import CheckpointError
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.joined_rows import JoinedRows
from pkm_lightning.memory.stored_rows import StoredRows
from pkm_lightning.ops import gathered_dot, weighted_gather

N, V, T, K = 5000, 12, 900, 3


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize(("kept", "used"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float64")])
def test_every_read_of_a_file_is_that_of_a_copy_in_memory(tmp_path: Path, kept: str, used: str, slices: int) -> None:
    rows = stored(tmp_path / "rows", torch.randn(N * slices, V // slices, dtype=getattr(torch, kept)))
    dtype = getattr(torch, used)
    with weight_dtype({"trainer": {"precision": {"float32": 32, "bfloat16": "bf16-true", "float64": 64}[used]}}):
        mapped, copied = (
            ValueTable(rows=N, dim=V, slices=slices, learning="rows", device=device, stored=rows)
            for device in ("mmap", "auto")
        )
    mapped.to(dtype)
    assert mapped.weight.is_meta
    assert not mapped.learns
    assert not copied.learns
    ids_TK, groups_TK = torch.randint(0, N * slices, (T, K)), torch.randint(0, 2, (T, K))
    x_TV = torch.randn(T, V // slices, dtype=dtype)
    weights_TK = torch.randn(T, K, dtype=dtype, requires_grad=True)
    found = []
    for table in (mapped, copied):
        outputs = [
            table(ids_TK, weights_TK),
            table(ids_TK.int(), weights_TK, groups_TK, 2),
            table.dot(x_TV, ids_TK),
            table.gather(ids_TK),
        ]
        (gradient_TK,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), weights_TK)
        found.append([*outputs, gradient_TK])
    assert [y.dtype for y in found[0]] == [dtype] * 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert mapped(ids_TK[:0], weights_TK[:0]).shape == (0, V // slices)
    with torch.device("meta"):  # where plans count shapes
        assert mapped.gather(ids_TK.to("meta")).shape == (T, K, V // slices)
    with pytest.raises(ValueError, match=f"ids has {N * slices}; allowed"):
        mapped.gather(torch.full((2, 1), N * slices))


def test_the_state_holds_a_digest_and_no_rows(tmp_path: Path) -> None:
    rows = stored(tmp_path / "rows", torch.randn(N, V))
    for device in ("auto", "mmap"):
        table = ValueTable(rows=N, dim=V, device=device, stored=rows)
        assert list(table.state_dict()) == ["rows_digest"]
        before = table.weight
        table.load_state_dict(table.state_dict())
        table.reset_parameters()
        assert table.weight is before
        table.unregister()
        assert list(table.state_dict()) == ["rows_digest"]
        table.load_state_dict(table.state_dict())
        assert not table.is_registered
    again = pickle.loads(pickle.dumps(copy.deepcopy(table)))
    assert torch.equal(again.gather(torch.tensor([[N - 1]])), table.gather(torch.tensor([[N - 1]])))


@pytest.mark.parametrize("shard", ["row", "dim"])
def test_each_rank_copies_its_part(tmp_path: Path, shard: str) -> None:
    rows_NV = torch.randn(10, 8).bfloat16()
    rows = stored(tmp_path / "rows", rows_NV)
    parts = [ValueTable(rows=10, dim=8, mesh=part_of(shard, 4, m), stored=rows).weight for m in range(4)]
    assert torch.equal(torch.cat(parts, 0 if shard == "row" else 1), rows_NV.float())


def test_the_digest_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    rows_NV = torch.randn(40_000, 8)  # 313 pages, of which 256 are read
    first = stored(tmp_path / "first", rows_NV).digest
    assert torch.equal(stored(tmp_path / "moved", rows_NV).digest, first)
    rows_NV[-1, -1] += 1
    assert not torch.equal(stored(tmp_path / "last", rows_NV).digest, first)
    assert not torch.equal(stored(tmp_path / "wider", rows_NV.view(20_000, 16)).digest, first)


def test_a_file_that_is_gone_or_cut_short_has_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = stored(path, torch.randn(N, V))
    unread = copy.copy(rows)
    rows.read(torch.tensor([1]))
    os.truncate(path, 500)
    for read in (lambda: rows.read(torch.arange(N)), lambda: rows.block(N - 1, 1), lambda: unread.digest):
        with pytest.raises(CheckpointError, match=rf"table.path={path} cannot be read \(.*; it holds the rows"):
            read()
    path.unlink()
    gone = StoredRows(path=path, start=0, dtype=torch.float32, lines=N, width=V)
    with pytest.raises(CheckpointError, match="No such file"):
        gone.read(torch.tensor([1]))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_file_in_use_may_be_touched_but_not_rewritten(tmp_path: Path, parts: int) -> None:
    table_NV, path = torch.randn(N // parts * parts, V), tmp_path / "rows"
    paths = [path.with_suffix(f".{part}") for part in range(parts)]
    chunks = [stored(file, rows_NV) for file, rows_NV in zip(paths, table_NV.chunk(parts), strict=True)]
    rows = chunks[0] if parts == 1 else JoinedRows(path, chunks)
    ids_U = torch.tensor([0, N // 2])
    before_UV = rows.read(ids_U)
    os.utime(paths[-1], (1, 1))
    assert torch.equal(rows.read(ids_U), before_UV)
    if parts > 1:
        os.replace(stored(tmp_path / "others", torch.zeros(N, V)).path, paths[0])
        # The file that is open is still the earlier one.
        assert torch.equal(rows.read(ids_U), before_UV)
    paths[-1].write_bytes(bytes(paths[-1].stat().st_size))
    for read in (lambda: rows.read(ids_U), lambda: rows.block(0, 1)):
        with pytest.raises(CheckpointError, match="holds other rows than at first"):
            read()


def test_a_table_of_320_million_rows_is_read_at_its_end(tmp_path: Path) -> None:
    last = HUGE[0] - 1
    written = {row: torch.randn(HUGE[1]).bfloat16() for row in (7, last - 1, last)}
    start = write_huge(tmp_path / "huge", written)
    rows = StoredRows(path=tmp_path / "huge", start=start, dtype=torch.bfloat16, lines=HUGE[0], width=HUGE[1])
    table = ValueTable(rows=HUGE[0], dim=HUGE[1], device="mmap", stored=rows)
    ids_TK = torch.tensor([[last, 7], [last - 1, last]])
    expected_TKV = torch.stack([written[i] for i in ids_TK.flatten().tolist()]).view(2, 2, -1)
    assert torch.equal(table.gather(ids_TK), expected_TKV.float())
    # The kernels themselves, on the whole table: ids are int32, but offsets must not be.
    whole_NV = MappedFile(tmp_path / "huge").tensor(start, torch.bfloat16, HUGE)
    ones_TK, x_TV = torch.ones(2, 2, dtype=torch.bfloat16), torch.randn(2, HUGE[1]).bfloat16()
    for backend in ("cpu", "eager", "reference"):
        one_TK = ids_TK[:, :1].int()
        assert torch.equal(weighted_gather(whole_NV, one_TK, ones_TK[:, :1], backend=backend), expected_TKV[:, 0])
        found_TK = gathered_dot(whole_NV, x_TV, ids_TK.int(), backend=backend)
        assert torch.allclose(found_TK.float(), (expected_TKV.float() * x_TV[:, None].float()).sum(-1), rtol=0.02)
