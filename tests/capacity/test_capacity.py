"""The plan's arithmetic on sizes that nobody runs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys import config

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.capacity import Plan, Setting, check_memory, check_setting, make_plan
from pkm_lightning.capacity.setting import device_count
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput, TableSpec
from pkm_lightning.memory import ValueTable

LARGE = ("ffn=memory_plus", "ffn.n_keys=10000", "ffn.value_dim=1024", "devices=8", "strategy=ddp",
         "trainer.accelerator=gpu")  # fmt: skip


class Silent(nn.Module):
    """A plugin that reads a table and does not say how."""

    def __init__(self, *, dim: int, table: ValueTable) -> None:
        super().__init__()

    @classmethod
    def table_spec(cls, *, dim: int, **_: object) -> TableSpec:
        return TableSpec(rows=64, dim=dim)

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD)


def plan(*overrides: str) -> Plan:
    given = config(*overrides)
    return make_plan(build_meta_model(given), given)


def refused(*overrides: str, **replaced: Any) -> str:
    given = {**config(*overrides), **replaced}
    with pytest.raises(ConfigError) as raised:
        check_setting(build_meta_model(given), given)
    return str(raised.value)


def test_a_group_holds_a_table_once() -> None:
    whole = 10**8 * 1024 * 4
    assert plan(*LARGE).memory.table_part == whole // 8
    assert plan(*LARGE, "table.shard=row", "table.group=4").memory.table_part == whole // 4
    assert plan(*LARGE, "table.shard=none").memory.table_part == whole
    assert plan(*LARGE, "trainer.precision=bf16-true").memory.table_part == whole // 16
    adagrad = plan(*LARGE, "table.shard=row", "table/optimizer=row_adagrad")
    assert adagrad.memory.table_states == 10**8 // 8 * 4


def test_a_table_in_host_memory_needs_none_of_the_device() -> None:
    here, there = plan(*LARGE), plan(*LARGE, "table.device=cpu")
    assert there.memory.table_part == there.memory.staged_reads == here.host.table_part == 0
    assert there.host.table_part == here.memory.table_part > 0
    assert there.traffic.table_forward == here.traffic.table_forward


def test_dense_learning_has_a_gradient_and_states_of_the_tables_size() -> None:
    held = plan(*LARGE, "table.learning=dense").memory
    assert held.table_gradients == held.table_part
    assert held.table_states == 2 * held.table_part
    assert held.staged_reads == 0


def test_what_replicas_send_is_held_with_the_own() -> None:
    made = plan(*LARGE, "table.group=2", "data.global_batch_size=1600")
    assert made.traffic.replicas is not None
    assert made.memory.merged_replicas == made.traffic.replicas * 4 // 3 > 0
    assert plan(*LARGE).memory.merged_replicas == 0


def test_counters_of_slot_usage_are_held_by_every_rank() -> None:
    slots, layers = 16**2, 3
    small = ("ffn=memory_plus", "model.memory.n_keys=16", "devices=2", "strategy=ddp")
    assert plan(*small).memory.usage_counters == 52 * slots * layers
    assert plan(*small, f"callbacks.slot_usage.max_slots={slots - 1}").memory.usage_counters == 0
    assert plan(*small, "callbacks=none").memory.usage_counters == 0
    assert plan(*small, "ffn=dense").memory.usage_counters == 0


def test_one_process_sends_nothing() -> None:
    alone = plan("ffn=memory_plus")
    assert alone.traffic_total == 0
    assert alone.setting.members == 1


def test_what_a_plugin_does_not_say_is_unknown() -> None:
    given = config("ffn=custom", f"ffn._target_={__name__}.Silent", "devices=2", "strategy=ddp")
    made = make_plan(
        build_meta_model({**given, "ffn": {"_target_": "pkm_lightning.ffn.Dense", "hidden_dim": 8}}), given
    )
    assert made.unknown == ()
    model = build_meta_model(config("ffn=memory_plus"))
    model.blocks[1].ffn = Silent(dim=64, table=model.tables[0])  # type: ignore[union-attr,arg-type]
    made = make_plan(model, given)
    assert made.unknown == ("Silent",)
    assert made.memory.staged_reads is made.traffic.table_forward is made.traffic.replicas is None
    assert made.memory.table_part > 0


def test_data_without_lengths_leave_reads_unknown() -> None:
    given = config("ffn=memory_plus", "devices=2", "strategy=ddp")
    del given["data"]["seq_len"]
    assert make_plan(build_meta_model(given), given).traffic.table_forward is None


@pytest.mark.parametrize(
    ("devices", "count"), [(3, 3), ("4", 4), ([0, 2], 2), ("0,1,", 2), ("auto", 1), (-1, 1)], ids=str
)
def test_devices_are_counted_as_lightning_does(devices: Any, count: int) -> None:
    assert device_count(devices, "cpu") == count


def test_a_strategy_of_somebody_else_leaves_the_dense_part_unknown() -> None:
    given = config("ffn=dense", "devices=2", "strategy=ddp")
    given["strategy"] = {"_target_": "my_module.MyStrategy"}
    assert Setting.of(given).strategy == "other"
    made = make_plan(build_meta_model(given), given)
    assert made.traffic.dense is made.memory.dense_weights is None


def test_what_cannot_work_names_what_can() -> None:
    assert "set strategy=ddp, or strategy=fsdp" in refused("devices=2")
    assert "trainer.num_nodes=2 needs a strategy" in refused("trainer.num_nodes=2")
    assert "allowed: 1, 2, 4, 8" in refused("devices=8", "strategy=ddp", "table.group=3")
    split = refused("devices=8", "strategy=ddp", "ffn=memory_plus", "ffn.value_dim=60")
    assert "set table.shard=row, or table.group=4" in split
    assert "allowed: 32-true, bf16-true" in refused("devices=2", "strategy=fsdp", "trainer.precision=16-mixed")
    assert "set trainer.precision=32-true" in refused("devices=2", "strategy=deepspeed_1", "trainer.precision=64")
    assert "at most 1,073,741,824 rows" in refused(
        "ffn=ultramem", "ffn.n_keys=46000", "ffn.expansion=1", "ffn.cores=2", "ffn.value_dim=4"
    )
    assert "table.shard='column'" in refused("devices=2", "strategy=ddp", "table.shard=column")


def test_deepspeed_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "run pip install deepspeed, or strategy=fsdp" in refused("devices=2", "strategy=deepspeed_2")


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    given = config(*LARGE, "table.group=2")
    model = build_meta_model(given)
    made = make_plan(model, given)
    with pytest.raises(ConfigError) as raised:
        check_memory(made, 80e9, model, given)
    message = str(raised.value)
    assert "a device needs 614." in message
    assert "has 80.0 GB" in message
    assert "table.device=cpu" in message
    assert "table/optimizer=row_adagrad (" not in message  # 205 GB a device
    with pytest.raises(ConfigError, match=r"table\.group=8 \(153\.\d GB\)"):
        check_memory(made, 160e9, model, given)
    with pytest.raises(ConfigError, match=r"this fits: table.device=cpu .*; or devices=32"):
        check_memory(made, 50e9, model, given)
    with pytest.raises(ConfigError, match="choose fewer rows"):
        check_memory(made, 100, model, given)
    check_memory(made, 620e9, model, given)
