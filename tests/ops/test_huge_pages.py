"""Large tensors on the CPU get huge pages: Linux notes the advice in the flags of the mapping."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pkm_lightning.memory import TableOptimizer, ValueTable
from pkm_lightning.ops import huge_pages
from pkm_lightning.ops.huge_pages import huge_zeros, use_huge_pages

SMAPS = Path("/proc/self/smaps")


def is_advised(values: Tensor) -> bool:
    """Returns whether the middle of a tensor lies in a mapping with the flag `hg`, "huge page advise"."""
    place = values.data_ptr() + values.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        start, end = (int(limit, 16) for limit in mapping.split(" ", 1)[0].split("-"))
        if start <= place < end:
            return " hg" in mapping.rpartition("VmFlags:")[2]
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux's huge pages"
)
def test_tables_and_states_are_advised() -> None:
    table = ValueTable(rows=2**13, dim=300, learning="rows")
    optimizer = TableOptimizer(None, {"table": table}, lr=0.1)
    states = [value for value in optimizer.state[table.weight].values() if isinstance(value, Tensor)]
    assert len(states) == 2
    assert all(is_advised(values) for values in (table.weight, *states))
    assert not any(value.any() for value in states)
    table.double()
    assert is_advised(table.weight)
    # Contents stay, and tensors without memory on the host are left alone.
    values = torch.arange(2**22)
    assert torch.equal(use_huge_pages(values, is_written=True), torch.arange(2**22))
    parameter = nn.Parameter(torch.ones(2**22))
    assert use_huge_pages(parameter) is parameter
    assert huge_zeros(2**30, 2**10, dtype=torch.float32, device=torch.device("meta")).is_meta


def test_small_tensors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by the flags of their pages: memory that was advised for a tensor before them may hold them.
    advised: list[int] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda start, length, advice: advised.append(length))
    small, large = torch.zeros(2**20), torch.zeros(2**22)
    assert use_huge_pages(small) is small
    assert not advised
    use_huge_pages(large)
    assert len(advised) == 1
    assert advised[0] <= large.nbytes


@pytest.mark.parametrize("refusal", ["platform", "library", "kernel"])
def test_where_advice_is_refused_nothing_changes(refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    huge_pages._madvise.cache_clear()
    if refusal == "platform":
        monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    elif refusal == "library":
        monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda _: object())
    else:
        monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *_: -1)
    values = torch.arange(2**22)
    assert use_huge_pages(values, is_written=True) is values
    assert torch.equal(values, torch.arange(2**22))
    assert not huge_zeros(2**11, 2**11, dtype=torch.float32, device=torch.device("cpu")).any()
    monkeypatch.undo()
    huge_pages._madvise.cache_clear()
