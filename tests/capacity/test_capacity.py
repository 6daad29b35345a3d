"""The plan's arithmetic on sizes beyond any test machine, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from toys import config

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.capacity import Plan, Setting, check_memory, check_setting, make_plan
from pkm_lightning.capacity.checks import _changed
from pkm_lightning.capacity.setting import device_count
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput, TableSpec
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

STRATEGIES = {
    name: {"_target_": f"pkm_lightning.strategies.{kind}"}
    for name, kind in {"fsdp": "FSDP2", "deepspeed": "DeepSpeed"}.items()
}


@functools.cache
def large() -> tuple[Transformer, dict[str, Any]]:
    """Returns a model of 10**8 rows of 1024 values and its configuration for eight devices."""
    given = config(
        "ffn=memory_plus", "ffn.n_keys=10000", "ffn.value_dim=1024", "devices=8", "strategy=ddp",
        "trainer.accelerator=gpu",
    )  # fmt: skip
    return build_meta_model(given), given


@functools.cache
def small() -> tuple[Transformer, dict[str, Any]]:
    given = config("ffn=memory_plus", "model.memory.n_keys=16", "devices=2", "strategy=ddp")
    return build_meta_model(given), given


DENSE = {"_target_": "pkm_lightning.ffn.Dense", "hidden_dim": 8}


class Silent(nn.Module):
    """A plugin with a table but without `reads()`."""

    def __init__(self, *, dim: int, table: ValueTable) -> None:
        super().__init__()

    @classmethod
    def table_spec(cls, *, dim: int, **_: object) -> TableSpec:
        return TableSpec(rows=64, dim=dim)

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(x_BTD)


def plan(changes: dict[str, Any] | None = None) -> Plan:
    """Returns the plan of `large` with `changes` to its configuration."""
    model, given = large()
    return make_plan(model, _changed(given, changes or {}))


def refused(changes: dict[str, Any]) -> str:
    """Returns the message that refuses `small` with `changes`."""
    model, given = small()
    with pytest.raises(ConfigError) as raised:
        check_setting(model, _changed(given, changes))
    return str(raised.value)


def test_a_group_holds_a_table_once() -> None:
    whole = 10**8 * 1024 * 4
    assert plan().memory.table_part == whole // 8
    assert plan({"table.shard": "row", "table.group": 4}).memory.table_part == whole // 4
    assert plan({"table.shard": "none"}).memory.table_part == whole
    assert plan({"trainer.precision": "bf16-true"}).memory.table_part == whole // 16
    adagrad = plan({"table.shard": "row", "table.optimizer": {"rule": "row_adagrad"}})
    assert adagrad.memory.table_states == 10**8 // 8 * 4
    factored = {"table.optimizer": {"rule": "factored_adam", "betas": [0.0, 0.95]}}
    assert plan(factored).memory.table_states == 10**8 * 3 + 1024 // 8 * 4
    assert plan({"table.shard": "row", **factored}).memory.table_states == 10**8 // 8 * 3 + 1024 * 4
    lazy = {"rule": "lazy_adam", "betas": [0.9, 0.95]}
    by_row = plan({"table.optimizer": {**lazy, "bias_correction": "row"}})
    assert by_row.memory.table_states == plan({"table.optimizer": lazy}).memory.table_states + 2 * 10**8


def test_sums_of_whole_columns_are_received_where_rows_are_split() -> None:
    factored, adagrad = ({"rule": rule, "betas": [0.0, 0.95]} for rule in ("factored_adam", "row_adagrad"))
    received = {
        (shard, rule["rule"]): plan({"table.shard": shard, "table.optimizer": rule}).traffic.row_statistics
        for shard in ("dim", "row")
        for rule in (factored, adagrad)
    }
    assert received["row", "row_adagrad"] == 0
    assert received["row", "factored_adam"] == 2 * 7 * 1024 * 4 // 8
    assert received["dim", "factored_adam"] == received["dim", "row_adagrad"] > 0


def test_a_table_in_host_memory_needs_none_of_the_device() -> None:
    device, host = plan(), plan({"table.device": "cpu"})
    assert host.memory.table_part == host.memory.staged_reads == device.host.table_part == 0
    assert host.host.table_part == device.memory.table_part > 0
    assert host.traffic.table_forward == device.traffic.table_forward


def test_dense_learning_has_a_gradient_and_states_of_the_tables_size() -> None:
    memory = plan({"table.learning": "dense"}).memory
    assert memory.table_gradients == memory.table_part
    assert memory.table_states == 2 * memory.table_part
    assert memory.staged_reads == 0


def test_memory_holds_what_all_replicas_send() -> None:
    replicated = plan({"table.group": 2, "data.global_batch_size": 1600})
    assert replicated.traffic.replicas is not None
    assert replicated.memory.merged_replicas == replicated.traffic.replicas * 4 // 3 > 0
    assert plan().memory.merged_replicas == 0


def test_every_rank_holds_the_counters_of_slot_usage() -> None:
    model, given = small()
    slots, layers = 16**2, 3

    def counters(callbacks: Any) -> int:
        return make_plan(model, {**given, "callbacks": callbacks}).memory.usage_counters

    assert counters(given["callbacks"]) == 52 * slots * layers
    assert counters({"slot_usage": {**given["callbacks"]["slot_usage"], "max_slots": slots - 1}}) == 0
    assert counters(None) == 0
    assert make_plan(build_meta_model({**given, "ffn": DENSE}), given).memory.usage_counters == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_scaled_after_accumulation_are_exchanged_by_zero_1_and_2_only(stage: int) -> None:
    def received(micro_batches: int) -> int:
        strategy = {**STRATEGIES["deepspeed"], "stage": stage}
        return plan({"strategy": strategy, "trainer.accumulate_grad_batches": micro_batches}).traffic.dense or 0

    # Each further micro-batch adds the same; the second also the exchange, fp32 in both directions between 8 ranks.
    exchange = received(2) - received(1) - (received(3) - received(2))
    trained = sum(parameter.numel() for parameter in large()[0].parameters() if parameter.requires_grad)
    assert exchange == (2 * 4 * trained * 7 // 8 if stage < 3 else 0)


def test_one_process_receives_nothing() -> None:
    model, given = small()
    alone = make_plan(model, _changed(given, {"trainer.devices": 1, "strategy": {}}))
    assert alone.traffic_total == 0
    assert alone.setting.members == 1


def test_figures_of_a_plugin_without_reads_are_unknown() -> None:
    _, given = small()
    assert make_plan(build_meta_model({**given, "ffn": DENSE}), given).unknown == ()
    model = build_meta_model(given)
    model.blocks[1].ffn = Silent(dim=64, table=model.tables[0])  # type: ignore[union-attr,arg-type]
    unknown = make_plan(model, given)
    assert unknown.unknown == ("Silent",)
    assert unknown.memory.staged_reads is unknown.traffic.table_forward is unknown.traffic.replicas is None
    assert unknown.memory.table_part > 0


def test_data_without_lengths_and_foreign_strategies_leave_figures_unknown() -> None:
    model, given = small()
    data = {key: value for key, value in given["data"].items() if key != "seq_len"}
    assert make_plan(model, {**given, "data": data}).traffic.table_forward is None
    foreign = {**given, "strategy": {"_target_": "my_module.MyStrategy"}}
    assert Setting.of(foreign).strategy == "other"
    assert make_plan(model, foreign).traffic.dense is make_plan(model, foreign).memory.dense_weights is None


@pytest.mark.parametrize(
    ("devices", "count"), [(3, 3), ("4", 4), ([0, 2], 2), ("0,1,", 2), ("auto", 1), (-1, 1)], ids=str
)
def test_devices_are_counted_as_lightning_does(devices: Any, count: int) -> None:
    assert device_count(devices, "cpu") == count


def test_what_cannot_work_names_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    single: dict[str, Any] = {"strategy": {}}
    assert "set strategy=ddp, or strategy=fsdp" in refused(single)
    assert "trainer.num_nodes=2 needs a strategy" in refused({**single, "trainer.devices": 1, "trainer.num_nodes": 2})
    assert "allowed: 1, 2, 4, 8" in refused({"trainer.devices": 8, "table.group": 3})
    fsdp = {"strategy": STRATEGIES["fsdp"], "trainer.precision": "16-mixed"}
    assert "allowed: 32-true, bf16-true" in refused(fsdp)
    deepspeed = {"strategy": {**STRATEGIES["deepspeed"], "stage": 1}}
    assert "set trainer.precision=32-true" in refused({**deepspeed, "trainer.precision": 64})
    assert "table.shard='rows' is not known; allowed: dim, row, none. Did you mean 'row'?" in refused(
        {"table.shard": "rows"}
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "run pip install deepspeed, or strategy=fsdp" in refused(deepspeed)


def test_tables_that_cannot_be_split_or_addressed() -> None:
    given = config("devices=8", "strategy=ddp", "ffn=memory_plus", "ffn.value_dim=60")
    with pytest.raises(ConfigError, match=r"set table\.shard=row, or table\.group=4"):
        check_setting(build_meta_model(given), given)
    given = config("ffn=ultramem", "ffn.n_keys=46000", "ffn.expansion=1", "ffn.cores=2", "ffn.value_dim=4")
    with pytest.raises(ConfigError, match="at most 1,073,741,824 rows"):
        check_setting(build_meta_model(given), given)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    model, given = large()
    given = _changed(given, {"table.group": 2})
    too_large = make_plan(model, given)
    with pytest.raises(ConfigError) as raised:
        check_memory(too_large, 80e9, model, given)
    message = str(raised.value)
    assert "a device needs 614." in message
    assert "has 80.0 GB" in message
    assert "table.device=cpu" in message
    assert "table/optimizer=row_adagrad (" not in message  # 205 GB per device
    with pytest.raises(ConfigError, match=r"table\.group=8 \(153\.\d GB\)"):
        check_memory(too_large, 160e9, model, given)
    with pytest.raises(ConfigError, match=r"this fits: table.device=cpu .*; or devices=32"):
        check_memory(too_large, 50e9, model, given)
    with pytest.raises(ConfigError, match="choose fewer rows"):
        check_memory(too_large, 100, model, given)
    check_memory(too_large, 620e9, model, given)
