"""Readers and tables get their names; counting never waits for a device, whatever is traced and counted."""

from __future__ import annotations

import pytest
import torch
import toys
from no_host import NoHost
from torch import nn

from pkm_lightning.ffn import FFNContext, FFNOutput, Slots
from pkm_lightning.memory import ValueTable
from pkm_lightning.ops import count_reads as op
from pkm_lightning.usage.counters import UsageCounters

HERE = torch.device("cpu")


class Tracer(nn.Module):
    """A plugin that declares any slots."""

    def __init__(self, *slots: Slots) -> None:
        super().__init__()
        self.declared = list(slots)

    def slots(self) -> list[Slots]:
        return self.declared

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD)


def counters(*ffns: nn.Module, **changes: object) -> UsageCounters:
    tables = {id(table): table for ffn in ffns if isinstance(ffn, Tracer) for s in ffn.declared for table in s.tables}
    model = toys.transformer(list(ffns), tables.values())
    return UsageCounters(model, **{"window": 4, "per_head": None, "device": HERE, "step": 0, **changes})  # type: ignore[arg-type]


def test_names_of_readers_and_tables() -> None:
    one, other, third = (ValueTable(rows=4, dim=2) for _ in range(3))
    made = counters(
        Tracer(Slots(name="slot", count=4, tables=(one,))),
        toys.dense(),
        Tracer(Slots(name="slot", count=4, tables=(other, third)), Slots(name="expert", count=3)),
        Tracer(Slots(name="slot", count=4, tables=(one,))),
    )
    assert list(made.readers) == ["layer0.slot", "layer2.slot", "layer2.expert", "layer3.slot"]
    assert {name: table.readers for name, table in made.tables.items()} == {
        "table0": ("layer0.slot", "layer3.slot"), "table1": ("layer2.slot",),
    }  # fmt: skip
    assert made.tables["table1"].tables == (other, third)


def test_three_shapes_of_traces_count_alike() -> None:
    made = counters(Tracer(*(Slots(name=name, count=4) for name in ("one", "heads", "choosing", "silent"))))
    chosen_BTN = torch.tensor([[[True, False, False, True], [False, True, True, True]]])
    weights_BTN = torch.ones(1, 2, 4)
    ids_BTK = torch.tensor([[[0, 3], [1, 2]]])
    trace = {
        "one_ids": ids_BTK, "one_weights": torch.ones(1, 2, 2),
        "heads_ids": ids_BTK[..., None], "heads_weights": torch.ones(1, 2, 2, 1),
        "choosing_chosen": chosen_BTN, "choosing_weights": weights_BTN,
    }  # fmt: skip
    made.add({0: trace}, {})
    made.end_step()
    assert made.total("layer0.one", "ever").counts_N.tolist() == [1, 1, 1, 1]
    assert made.total("layer0.heads", "ever").counts_N.tolist() == [1, 1, 1, 1]
    assert made.total("layer0.choosing", "ever").counts_N.tolist() == [1, 1, 1, 2]
    assert not made.total("layer0.silent", "ever").counts_N.any()
    made.add({0: trace}, {"valid": torch.tensor([[True, False]])})
    assert made.total("layer0.choosing", "window").counts_N.tolist() == [2, 1, 1, 3]


def test_counting_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the torch implementation, as on a GPU, over several periods."""
    import sys

    monkeypatch.setattr(sys.modules[op.__module__], "HAS_NUMBA", False)
    made = counters(
        Tracer(Slots(name="slot", count=9, n_keys=3), Slots(name="expert", count=4)), per_head="halves", window=2
    )
    trace = {
        "slot_ids": torch.randint(9, (2, 3, 2, 4)).int(), "slot_weights": torch.randn(2, 3, 2, 4).bfloat16(),
        "expert_chosen": torch.rand(2, 3, 4) > 0.5, "expert_weights": torch.rand(2, 3, 4),
    }  # fmt: skip
    valid = {"valid": torch.rand(2, 3) > 0.3}
    with NoHost():
        for _ in range(5):
            made.add({0: trace}, valid)
            made.add_effective({0: trace}, valid)
            made.end_step()
    assert int(made.total("layer0.slot", "ever").counts_N.sum()) == 5 * 8 * int(valid["valid"].sum())
    assert int(made.total_of_heads("layer0.slot", "window").counts_N.sum()) == 2 * 2 * 8 * int(valid["valid"].sum())
