"""Tables in several parts, which `table.tensor` names by a star, and several tables by a list."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from pkm_lightning.build.row_files import find_rows, map_rows
from pkm_lightning.errors import CheckpointError, ConfigError, PkmError
from pkm_lightning.ffn import TableSpec

#: Of more parts than one digit has numbers, so that an order by name would be another.
TABLE = torch.arange(36.0).view(12, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Writes the parts of one table into two files, an unrelated tensor, and a second table."""
    parts = {f"t.part_{number}.weight": row[None] for number, row in enumerate(TABLE)}
    first = {name: value for name, value in parts.items() if int(name[7:-7]) % 2}
    second = {name: value for name, value in parts.items() if name not in first}
    save_file({**first, "t.part_x.weight": torch.zeros(1, 3)}, tmp_path / "a.safetensors")
    save_file({**second, "other": -TABLE, "t.part_1.bias": torch.zeros(3)}, tmp_path / "b.safetensors")
    return tmp_path


def find(path: Path, tensor: Any, number: int = 0, count: int = 1, rows: int = 12) -> torch.Tensor:
    stored = find_rows({"path": path, "tensor": tensor}, TableSpec(rows=rows, dim=3), number, count)
    return stored.block(0, rows)


def test_parts_are_one_table_in_the_order_of_their_numbers(path: Path) -> None:
    assert torch.equal(find(path, "t.part_*.weight"), TABLE)
    names = ["t.part_*.weight", "other"]
    assert torch.equal(find(path, names, 0, 2), TABLE)
    assert torch.equal(find(path, names, 1, 2), -TABLE)
    assert torch.equal(find(path, None), -TABLE)


def test_parts_are_found_by_the_digest_of_the_table(path: Path) -> None:
    table = {"path": path, "tensor": ["t.part_*.weight", "other"]}
    for number, expected in enumerate((TABLE, -TABLE)):
        digest = find_rows(table, TableSpec(rows=12, dim=3), number, 2).digest.tolist()
        assert torch.equal(torch.cat([values for _, values in map_rows(table, digest)]), expected)
    assert map_rows(table, [*digest[:-1], 0]) == []


def test_parts_of_numbered_tables_are_found_by_the_digest(tmp_path: Path) -> None:
    parts = {f"t{number}.{part}": rows for number in (0, 1) for part, rows in enumerate((TABLE + number).split(5))}
    save_file({name: rows.clone() for name, rows in parts.items()}, tmp_path / "a.safetensors")
    table = {"path": tmp_path, "tensor": "t{}.*"}
    for number in (0, 1):
        digest = find_rows(table, TableSpec(rows=12, dim=3), number, 2).digest.tolist()
        assert torch.equal(torch.cat([values for _, values in map_rows(table, digest)]), TABLE + number)


def test_a_file_of_a_folder_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": TABLE, "b": -TABLE}, file)
    assert torch.equal(find(tmp_path, "b"), -TABLE)
    content = save({"a": torch.zeros(1), "b": 2 * TABLE, "c": TABLE})
    file.write_bytes(content)  # the folder itself has not changed
    assert torch.equal(find(tmp_path, "b"), 2 * TABLE)


def test_other_tensors_may_be_of_a_kind_that_torch_lacks(tmp_path: Path) -> None:
    content = save({"a": TABLE, "packed": torch.zeros(8, dtype=torch.uint8)})
    foreign = content.replace(b'"dtype":"U8","shape":[8]', b'"dtype":"F4","shape":[16]')
    length = struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + len(foreign) - len(content))
    (tmp_path / "a.safetensors").write_bytes(length + foreign[8:])
    assert torch.equal(find(tmp_path, None), TABLE)
    with pytest.raises(ConfigError, match="packed has 8 values of uint8"):
        find(tmp_path, "packed")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"weight_map": [1]}', "{}", "\ufeff", None])
def test_an_index_that_is_unreadable_is_named(path: Path, content: str | None) -> None:
    index = path / "model.safetensors.index.json"
    os.mkfifo(index) if content is None else index.write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is unreadable; restore it"):
        find(path, "other")


@pytest.mark.parametrize(
    ("tensor", "count", "rows", "message"),
    [
        (["other"], 2, 12, "table.tensor=['other'] names 1 tensors, and this model has 2 tables; name one per table."),
        ("t.part_*.weight", 2, 12, "names one tensor, but this model has 2 tables"),
        ("t.part_*.weight", 1, 11, "t.part_*.weight has 12 x 3 values of float32, but the model's table has 11 x 3"),
        ("s.part_*.weight", 1, 12, "holds no tensor s.part_*.weight (table.tensor)"),
        ("gap_*", 1, 12, "lacks gap_1, a part of a table of 3 parts or more; fetch its files again."),
        ("mixed_*", 1, 12, "has 2 x 3 values of float16 and float32"),
        ("skewed_*", 1, 12, "skewed_* has 1 x 2 values of float32"),
    ],
)
def test_refusals(path: Path, tensor: Any, count: int, rows: int, message: str) -> None:
    row = torch.zeros(1, 3)
    odd = {"gap_0": row, "gap_2": row, "mixed_0": row, "mixed_1": row.half(), "skewed_0": row, "skewed_1": row[:, :2]}
    save_file({name: value.clone() for name, value in odd.items()}, path / "c.safetensors")
    with pytest.raises(PkmError, match=re.escape(message)):
        find(path, tensor, 0, count, rows)
