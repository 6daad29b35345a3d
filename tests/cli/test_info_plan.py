"""`info` of several devices: memory and communication before anything is launched, and refusals that `fit` shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import SMALL_RUN, Run, resolved

from pkm_lightning.cli.plan_rows import plan_rows
from pkm_lightning.cli.resume import differences
from pkm_lightning.errors import ConfigError


def test_the_table_and_the_json_agree(cli: Run, tmp_path: Path) -> None:
    arguments = ["info", "strategy=fsdp", "devices=8", "table.group=4", "data.global_batch_size=64"]
    shown = cli(*arguments, "format=json")
    assert shown.code == 0, shown.err
    plan = json.loads(shown.out)["plan"]
    assert (plan["devices"], plan["strategy"]) == (8, "fsdp")
    assert plan["table"] == {"shard": "dim", "group": 4, "copies": 2}
    assert plan["tokens_per_device_and_step"] == 8 * 64
    for part in ("memory_per_device", "received_per_step"):
        assert plan[part]["total"] == sum(size for name, size in plan[part].items() if name != "total") > 0
    assert plan["memory_per_device"]["table_part"] == 65536 * 64 * 4 // 4
    table = cli(*arguments).out
    assert "8, fsdp" in table
    assert "by dim over 4, 2 copies" in table
    assert f"4.2 MB ({plan['memory_per_device']['table_part']:,} bytes)" in table
    assert list(tmp_path.iterdir()) == []


def test_devices_may_be_said_in_two_ways(cli: Run) -> None:
    figures = [
        json.loads(cli("info", "strategy=ddp", said, "format=json").out) for said in ("devices=2", "trainer.devices=2")
    ]
    assert figures[0] == figures[1]
    assert figures[0]["plan"]["devices"] == 2
    assert "plan" not in json.loads(cli("info", "format=json").out)


def test_an_interrupted_run_goes_on_whichever_way_devices_are_said() -> None:
    saved = {"seed": 1, "devices": 2, "trainer": {"devices": 2}}
    assert differences(saved, {"seed": 1, "devices": 1, "device_memory": 80, "trainer": {"devices": 2}}) == []
    assert differences(saved, {"seed": 2, "devices": 1, "trainer": {"devices": 2}}) == ["seed: 1 -> 2"]


def test_variants_are_planned_side_by_side(cli: Run) -> None:
    shown = cli("info", "ffn=dense,memory_plus,moe", "strategy=ddp", "devices=2", "format=json")
    assert shown.code == 0, shown.err
    plans = [figures["plan"] for figures in json.loads(shown.out)]
    assert [plan["memory_per_device"]["table_part"] > 0 for plan in plans] == [False, True, False]


def test_strategies_stand_side_by_side(cli: Run) -> None:
    arguments = ["info", "strategy=fsdp,deepspeed_2", "devices=2", "device_memory=1"]
    figures = json.loads(cli(*arguments, "format=json").out)
    assert [f["variant"] for f in figures] == ["fsdp", "deepspeed_2"]
    assert [f["plan"]["strategy"] for f in figures] == ["fsdp", "zero2"]
    rows = dict(plan_rows(figures[1]["plan"]))
    assert (rows["devices, strategy"], rows["tables"]) == ("2, deepspeed_2", "by dim over 2, 1 copy")
    both = json.loads(cli(*arguments, "ffn=dense,memory_plus", "format=json").out)
    names = ["dense, fsdp", "dense, deepspeed_2", "memory_plus, fsdp", "memory_plus, deepspeed_2"]
    assert [f["variant"] for f in both] == names
    assert "tables" not in dict(plan_rows(both[0]["plan"]))
    held = {**figures[1]["plan"]["memory_per_device"], "activations": None}
    unknown = dict(plan_rows({**figures[1]["plan"], "memory_per_device": held}))
    assert unknown["  activations of a micro-batch"] == "unknown"
    assert {"memory per device, at least", "  left of 1.0 GB, at most"} <= unknown.keys()
    assert {name: f["plan"]["memory_per_device"] for name, f in zip(names, both, strict=True)}[names[2]] == (
        figures[0]["plan"]["memory_per_device"]
    )


@pytest.mark.parametrize("devices", [[], ["strategy=ddp", "devices=2"]], ids=["alone", "two"])
def test_what_fits_is_said_with_what_is_left(cli: Run, devices: list[str]) -> None:
    plan = json.loads(cli("info", "device_memory=2", "format=json", *devices).out)["plan"]
    held = plan["memory_per_device"]
    assert held["activations"] > 0 < held["logits"]
    assert plan["device_memory_left"] == 2e9 - held["total"] > 0
    shown = cli("info", "device_memory=2", *devices).out
    assert "left of 2.0 GB" in shown
    assert f"{round(plan['device_memory_left']):,} bytes" in shown


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3"])
def test_every_strategy_is_planned(strategy: str) -> None:
    received = resolved(f"strategy={strategy}", "devices=4").plan.traffic.dense
    assert received is not None
    assert received > 0


def test_what_does_not_fit_is_refused_in_one_sentence(cli: Run) -> None:
    shown = cli("info", "model=1.3b", "ffn.n_keys=10000", "devices=8", "strategy=fsdp", "device_memory=80")
    assert shown.code == 2
    assert len(shown.err.splitlines()) == 1
    assert "but has 80.0 GB (device_memory); this fits: " in shown.err
    batch = cli("info", "model=134m", "ffn=dense", "data.seq_len=1024", "device_memory=30")
    assert "the most for activations" in batch.err
    assert "this fits: model.activation_checkpointing=true (" in batch.err
    assert batch.err.count("trainer.accumulate_grad_batches=") == 1
    both = cli("info", "model=134m", "ffn=dense", "data.seq_len=1024", "device_memory=6")
    assert "this fits: model.activation_checkpointing=true trainer.accumulate_grad_batches=" in both.err
    alone = cli("info", "device_memory=0.001")
    assert alone.code == 2
    assert "has 1.0 MB" in alone.err


def test_fit_refuses_what_info_refuses_before_it_starts(cli: Run, tmp_path: Path) -> None:
    for verb in ("info", "fit"):
        shown = cli(verb, *SMALL_RUN, "devices=4", "strategy=ddp", "table.group=3", "run_dir=run")
        assert shown.code == 2
        assert "allowed: 1, 2, 4" in shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["devices=2"], "set strategy=ddp"),
        (["devices=2", "strategy=fsdp", "trainer.precision=64-true"], "allowed: 32-true, bf16-true"),
        (["devices=2", "strategy=ddp", "ffn.value_dim=7"], "set table.shard=row, or table.group=1"),
        (["device_memory=much"], "device_memory='much' is not a number"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(*overrides)
