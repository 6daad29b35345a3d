"""A table in several parts reads as the same table in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pkm_lightning.errors import CheckpointError
from pkm_lightning.memory.joined_rows import JoinedRows
from pkm_lightning.memory.stored_rows import StoredRows

#: Lines of each part; one is empty.
PARTS = (5, 1, 0, 900, 37)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[JoinedRows, StoredRows, torch.Tensor]:
    """Returns parts in two files, the table in one, and its values."""
    values = torch.randn(sum(PARTS), 7).to(request.param)
    options = {"dtype": request.param, "width": 7}
    (tmp_path / "whole").write_bytes(b"head" + values.view(torch.uint8).numpy().tobytes())
    whole = StoredRows(path=tmp_path / "whole", start=4, lines=len(values), **options)
    parts, places = [], {"a": 0, "b": 0}
    for number, rows in enumerate(values.split(PARTS)):
        name, content = "ab"[number % 2], rows.view(torch.uint8).numpy().tobytes()
        with (tmp_path / name).open("ab") as file:
            file.write(content)
        parts.append(StoredRows(path=tmp_path / name, start=places[name], lines=len(rows), **options))
        places[name] += len(content)
    return JoinedRows(tmp_path, parts), whole, values


def test_lines_blocks_and_digest_are_those_of_the_whole(table: tuple[JoinedRows, StoredRows, torch.Tensor]) -> None:
    joined, whole, values = table
    few, many = torch.tensor([0, 4, 5, 6, 905, 906, 942]), torch.randint(len(values), (3000,))
    for ids in (few, many, few[:0]):
        assert torch.equal(joined.read(ids), values[ids])
    for first, count in ((0, len(values)), (4, 3), (5, 1), (900, 43)):
        assert torch.equal(joined.block(first, count), values[first : first + count])
    assert torch.equal(joined.digest, whole.digest)


def test_lines_that_are_not_there_are_refused(table: tuple[JoinedRows, StoredRows, torch.Tensor]) -> None:
    joined, _, values = table
    for wrong in (-1, len(values)):
        with pytest.raises(ValueError, match="ids"):
            joined.read(torch.tensor([0, wrong]))
    with (joined.path / "a").open("ab") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"table\.path=.* cannot be read"):
        joined.read(torch.arange(len(values)))
