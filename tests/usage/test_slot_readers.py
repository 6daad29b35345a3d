"""Plugins whose slots or traces do not match are refused by name; tables that overlap are one set."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from usage.test_counters import Tracer, counters

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import Slots
from pkm_lightning.memory import ValueTable
from pkm_lightning.usage.figures import figures, report
from pkm_lightning.usage.revival import Revival, _sample
from pkm_lightning.usage.revival_history import RevivalHistory

SLOT = Slots(name="slot", count=4)
BATCH = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}
IDS, WEIGHTS = torch.zeros(1, 2, 3, dtype=torch.int64), torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ((SLOT, Slots(name="slot", count=3)), r"layer0: slots\(\) of Tracer has 'slot' 2 times"),
        (
            (Slots(name="slot", count=0),),
            r"layer0: slots\(\) of Tracer has 'slot' with count=0; allowed: 1 or more",
        ),
        ((Slots(name="slot", count=4, n_keys=3),), r"count=4 and n_keys=3, but pairs of sub-keys are n_keys\*\*2 = 9"),
        (
            (Slots(name="slot", count=4, tables=(ValueTable(rows=5, dim=2),)),),
            r"count=4, but its tables have \[5\] rows",
        ),
        (
            (Slots(name="slot", count=4, tables=(ValueTable(rows=5, dim=2),), padding=2),),
            r"count=4 and padding=2, but its tables have \[5\] rows",
        ),
    ],
)
def test_inconsistent_slots_are_refused(declared: tuple[Slots, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        counters(Tracer(*declared))


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({"slot_ids": IDS}, r"layer0: Tracer traces slot_ids of shape \(1, 2, 3\), .* has none"),
        (
            {"slot_ids": IDS, "slot_weights": WEIGHTS[..., :2]},
            r"has slot_weights of shape \(1, 2, 2\); correct the plugin",
        ),
        ({"slots_ids": IDS, "slots_weights": WEIGHTS}, r"traces slots_ids, but .* 'slot'; .* Did you mean 'slots'\?"),
        ({"slot_ids": WEIGHTS, "slot_weights": WEIGHTS}, "slot_ids as torch.float32 .* allowed: int32 or int64"),
        ({"slot_ids": IDS[0], "slot_weights": WEIGHTS[0]}, r"of shape \(2, 3\); allowed: .* \(B, T, K\)"),
        ({"slot_ids": IDS[:, :1], "slot_weights": WEIGHTS[:, :1]}, r"but the micro-batch has \(B, T\) = \(1, 2\)"),
        ({"slot_chosen": IDS > 0, "slot_weights": WEIGHTS}, r"slot_chosen .* allowed: bool of shape \(B, T, 4\)"),
    ],
)
def test_traces_that_do_not_fit_are_refused(trace: dict[str, torch.Tensor], message: str) -> None:
    made = counters(Tracer(SLOT))
    with pytest.raises(ConfigError, match=message):
        made.add({0: trace}, BATCH)


def test_rows_that_no_id_reads_are_in_no_figure() -> None:
    table = ValueTable(rows=8, dim=2)
    made = counters(*(Tracer(Slots(name="slot", count=n, tables=(table,), padding=8 - n)) for n in (4, 6)))
    traces = {
        layer: {"slot_ids": torch.arange(n).view(1, 1, n), "slot_weights": torch.ones(1, 1, n)}
        for layer, n in enumerate((4, 6))
    }
    made.add(traces, {"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
    made.end_step()
    assert figures(made, "layer0.slot", "ever")["used_percent"] == 100
    assert figures(made, "table0", "ever")["used_percent"] == 100
    assert made.total("table0", "ever").counts_N.tolist() == [2, 2, 2, 2, 1, 1]
    assert made.last_read("table0").tolist() == [1] * 6
    entry = report(made, 1, dead_after=1)["tables"]["table0"]
    assert (entry["slots"], entry["dead"]) == (6, 0)


def test_slots_that_are_never_traced_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    made = counters(Tracer(SLOT))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made.add({}, BATCH)
            made.end_step()
    assert caplog.messages == ["layer0.slot is not counted, since its plugin traces neither slot_ids nor slot_chosen"]


def test_steps_without_a_trace_leave_the_window() -> None:
    made = counters(Tracer(SLOT))
    made.add({0: {"slot_ids": IDS, "slot_weights": WEIGHTS}}, BATCH)
    for _ in range(4):
        made.end_step()
        made.add({}, BATCH)
    assert not made.total("layer0.slot", "window").counts_N.any()
    assert int(made.total("layer0.slot", "ever").counts_N.sum()) == 6


def overlapping() -> tuple[Any, list[ValueTable]]:
    """Returns counters and tables of layers 0 to 2, whose tables layer 1 connects, and of layer 3 with its own."""
    first, second, third, separate = (ValueTable(rows=4, dim=2) for _ in range(4))
    sets = ((first,), (first, second), (second, third), (separate,))
    made = counters(*(Tracer(Slots(name="slot", count=4, tables=tables)) for tables in sets))
    return made, [first, second, third, separate]


def test_tables_that_overlap_are_one_set() -> None:
    made, (first, second, third, separate) = overlapping()
    assert {name: (one.readers, one.tables) for name, one in made.tables.items()} == {
        "table0": (("layer0.slot", "layer1.slot", "layer2.slot"), (first, second, third)),
        "table1": (("layer3.slot",), (separate,)),
    }


def test_a_row_that_one_of_them_reads_is_not_revived() -> None:
    made, tables = overlapping()
    before = [table.weight.detach().clone() for table in tables]
    for _ in range(4):
        ids = {0: 0, 1: 1, 2: 2, 3: 0}
        traces = {layer: {"slot_ids": IDS + slot, "slot_weights": WEIGHTS} for layer, slot in ids.items()}
        made.add(traces, BATCH)
        made.end_step()
    history = RevivalHistory()
    revival = Revival(made, history, [], dead_after=2, max_share=1.0, noise=0.0, seed=0, step=4)
    revival.rows("table0", None)
    for table, weight in zip(tables[:3], before, strict=False):
        assert (table.weight != weight).any(1).tolist() == [False, False, False, True]
    assert torch.equal(tables[3].weight, before[3])
    assert history.counts == {"table0": 1}


@pytest.mark.parametrize("per_head", ["halves", "full"])
def test_ids_out_of_range_are_no_sub_key_of_another_half(per_head: str) -> None:
    made = counters(Tracer(Slots(name="slot", count=4, n_keys=2)), per_head=per_head)
    expected = [[[1, 0], [1, 0]], [[0, 2], [1, 1]]]
    ids_BTHK = torch.tensor([[[[0, 4], [3, 7]], [[-1, 100], [-7, 2]]]])
    made.add({0: {"slot_ids": ids_BTHK, "slot_weights": torch.ones(1, 2, 2, 2)}}, BATCH)
    found = made.heads["layer0.slot"].by_sub_key(made.total_of_heads("layer0.slot", "ever").counts_N, torch.sum)
    assert found.tolist() == expected


def test_padding_is_no_query() -> None:
    q_TH2P = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 3)
    assert _sample(q_TH2P, torch.tensor([True, False, True, False]))[:, 0, 0, 0].tolist() == [0, 2]
    assert len(_sample(q_TH2P, torch.zeros(4, dtype=torch.bool))) == len(_sample(q_TH2P, None)) == 4
    assert len(_sample(torch.zeros(10_000, 1, 2, 1), None)) <= 4096


def test_dead_rows_become_each_of_the_busiest_rows_in_turn() -> None:
    made = counters(Tracer(Slots(name="slot", count=6, tables=(table := ValueTable(rows=6, dim=3),))))
    before = table.weight.detach().clone()
    for slot in (1, 1, 4, 1, 4, 1):
        ids_BTK = torch.full((1, 2, 1), slot)
        made.add({0: {"slot_ids": ids_BTK, "slot_weights": torch.ones(1, 2, 1)}}, BATCH)
        made.end_step()
    revival = Revival(made, RevivalHistory(), [], dead_after=4, max_share=1.0, noise=0.0, seed=0, step=6)
    revival.rows("table0", None)
    assert torch.equal(table.weight, before[[1, 1, 4, 1, 4, 4]])
