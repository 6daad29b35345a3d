"""Optimizer groups by role, each parameter once, and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from toys import Constant, config, dense, memory_ffns, transformer
from training.fits import fit, rows, settings

from pkm_lightning.build.schedule import configured_schedule, schedule_factor
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import module as module_file
from pkm_lightning.training.optimizer import parameter_groups, parameter_roles

OPTIM = {"lr": 0.01, "weight_decay": 0.1, "table_lr_factor": 4.0, "table_weight_decay": 0.03}


def roles(model: nn.Module) -> dict[str, str]:
    return {name: role for name, _, role in parameter_roles(model)}


def test_roles_of_a_memory_model() -> None:
    found = roles(transformer(*memory_ffns()))
    assert found["tables.0.weight"] == "table"
    assert found["embedding.weight"] == "embedding"
    assert found["unembedding.weight"] == "matrix"
    assert found["norm.weight"] == "norm"
    assert found["blocks.0.attention_norm.weight"] == "norm"
    assert found["blocks.0.attention.query.weight"] == "matrix"
    assert found["blocks.1.ffn.addressing.keys.keys"] == "key"
    assert found["blocks.1.ffn.addressing.keys.norm.weight"] == "norm"
    assert found["blocks.1.ffn.addressing.query.projection.bias"] == "bias"
    assert list(found.values()).count("table") == 1


def test_roles_of_foreign_modules() -> None:
    model = nn.ModuleDict(
        {"batch": nn.BatchNorm1d(3), "bag": nn.EmbeddingBag(4, 3), "linear": nn.Linear(3, 3), "scalar": Constant()}
    )
    assert roles(model) == {
        "batch.weight": "norm",
        "batch.bias": "norm",
        "bag.weight": "embedding",
        "linear.weight": "matrix",
        "linear.bias": "bias",
        "scalar.value": "norm",
    }


def test_frozen_and_shared_parameters() -> None:
    first, second, frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    frozen.weight.requires_grad_(False)
    found = roles(nn.ModuleList([first, second, frozen]))
    assert found == {"0.weight": "matrix", "0.bias": "bias", "1.bias": "bias", "2.bias": "bias"}


def test_groups_hold_each_parameter_once_with_its_rate_and_decay() -> None:
    model = transformer(*memory_ffns())
    groups = {group["name"]: group for group in parameter_groups(model, OPTIM)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "matrix": (0.01, 0.1),
        "gain": (0.01, 0.0),
        "table": (0.04, 0.03),
    }
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert [id(p) for p in groups["table"]["params"]] == [id(model.tables[0].weight)]


def test_empty_groups_are_left_out() -> None:
    assert [group["name"] for group in parameter_groups(transformer([dense()]), OPTIM)] == ["matrix", "gain"]


class WrongRole(nn.Linear):
    parameter_roles = {"weight": "gate"}  # noqa: RUF012


class WrongName(nn.Linear):
    parameter_roles = {"bias": "bias", "wieght": "matrix"}  # noqa: RUF012


def test_a_declared_role_wins_and_must_exist() -> None:
    layer = nn.Linear(3, 3)
    layer.parameter_roles = {"weight": "embedding"}
    assert roles(layer)["weight"] == "embedding"
    with pytest.raises(ConfigError, match=r"WrongRole.parameter_roles\['weight'\]='gate' is not known; allowed: "):
        roles(WrongRole(3, 3))
    message = r"WrongName.parameter_roles\['wieght'\] is not a parameter of the module; allowed: weight.* Did you mean"
    with pytest.raises(ConfigError, match=message):
        roles(WrongName(3, 3, bias=False))  # a declared bias that is None is not a typo


def factor_at(step: int, schedule: str = "cosine", **changes: Any) -> float:
    settings = {"max_steps": 110, "warmup_steps": 10, "final_factor": 0.2, "decay_share": 0.5, **changes}
    return schedule_factor(schedule, **settings)(step)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_start_warm_up_and_end_alike(schedule: str) -> None:
    assert factor_at(0, schedule) == pytest.approx(0.1)
    assert factor_at(4, schedule) == pytest.approx(0.5)
    assert factor_at(9, schedule) == pytest.approx(1.0)
    assert factor_at(10, schedule) == pytest.approx(1.0)
    assert factor_at(110, schedule) == pytest.approx(0.2)
    assert factor_at(500, schedule) == pytest.approx(0.2)
    assert factor_at(0, schedule, warmup_steps=0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 60, 0.6),
        ("linear", 85, 0.4),
        ("cosine", 60, 0.6),
        ("cosine", 35, 0.2 + 0.8 * (0.5 + math.sqrt(0.125))),
        ("wsd", 30, 1.0),
        ("wsd", 55, 1.0),
        ("wsd", 82.5, 0.6),
    ],
)
def test_schedules_in_the_middle(schedule: str, step: int, expected: float) -> None:
    assert factor_at(step, schedule) == pytest.approx(expected)


def test_wsd_with_a_decay_longer_than_what_warm_up_leaves() -> None:
    factors = [factor_at(step, "wsd", decay_share=1.0) for step in range(10, 111)]
    assert factors == sorted(factors, reverse=True)
    assert (factors[0], factors[50], factors[-1]) == pytest.approx((1.0, 0.6, 0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, r"optim.schedule='cosin' is not known; .* Did you mean 'cosine'\?"),
        ({"final_factor": 1.5}, r"optim.final_factor=1.5 is out of range; allowed: 0 to 1"),
        ({"decay_share": -0.1}, r"optim.decay_share=-0.1 is out of range"),
        ({"warmup_steps": 111}, r"^optim.warmup_steps=111 is out of range; allowed: 0 to 110"),
        ({"max_steps": -1}, r"trainer.max_steps=-1 gives the schedule no length"),
    ],
)
def test_schedules_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        factor_at(0, **changes)


def test_the_shipped_configuration_makes_a_schedule_and_groups() -> None:
    optim = config()["optim"]
    rates = [group["lr"] for group in parameter_groups(transformer(*memory_ffns()), optim)]
    assert rates == [optim["lr"], optim["lr"], optim["lr"] * optim["table_lr_factor"]]


def test_sub_keys_have_a_rate_of_their_own_or_are_matrices_like_others() -> None:
    model = transformer(*memory_ffns())
    keys = [p for _, p, role in parameter_roles(model) if role == "key"]
    before = parameter_groups(model, OPTIM)
    assert [group["name"] for group in before] == ["matrix", "gain", "table"]
    assert [len(group["params"]) for group in parameter_groups(model, {**OPTIM, "key_lr_factor": 1.0})] == [
        len(group["params"]) for group in before
    ]
    *_, of_keys = parameter_groups(model, {**OPTIM, "key_lr_factor": 0.5})
    assert (of_keys["name"], of_keys["lr"], of_keys["weight_decay"]) == ("key", 0.005, 0.1)
    assert [id(p) for p in of_keys["params"]] == [id(p) for p in keys]
    assert len(keys) == 2


#: A value for every key of `optim` that differs from all others.
WIRED: dict[str, Any] = {
    "optimizer": {"_target_": "torch.optim.AdamW", "betas": [0.61, 0.62], "eps": 0.063, "fused": False},
    "lr": 0.64, "weight_decay": 0.065, "table_lr_factor": 6.6, "key_lr_factor": 0.5, "table_weight_decay": 0.067,
    "clip_norm": 0.68, "table_clip_norm": 0.069, "schedule": "wsd", "warmup_share": 0.3, "warmup_steps": 10,
    "final_factor": 0.25, "decay_share": 0.4, "freeze": ["embedding*"],
}  # fmt: skip


@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_every_key_of_optim_reaches_its_place(learning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings("ffn=memory_plus", f"table.learning={learning}")
    assert given["optim"].keys() == WIRED.keys()
    given["optim"], given["trainer"]["max_steps"] = WIRED, 100
    limits: dict[str, Any] = {}
    monkeypatch.setattr(module_file, "clip_by_norm", lambda _, limit: limits.update(dense=limit) or torch.ones(()))
    monkeypatch.setattr(module_file, "clip_tables", lambda *part: limits.update(table=part[-1]) or torch.ones(()))
    module = fit(given, [rows(2)])
    optimizer = module.trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(module.model.embedding.weight) not in trained
    assert id(module.model.norm.weight) in trained
    assert limits == {"dense": 0.68, "table": 0.069}
    scheduled = {group["name"]: (group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert scheduled == {
        "matrix": (0.64, 0.065),
        "gain": (0.64, 0.0),
        "key": (0.32, 0.065),
        "table": (pytest.approx(0.64 * 6.6), 0.067),
    }
    own = [group for group in optimizer.param_groups if learning == "dense" or group["name"] != "table"]
    assert {(*group["betas"], group["eps"], group["fused"]) for group in own} == {(0.61, 0.62, 0.063, False)}
    factor = configured_schedule(WIRED, 100)
    # Warm-up over 10 steps, the full rate to step 60, then down to a quarter at step 100.
    assert [factor(step) for step in (4, 9, 60, 80, 100)] == pytest.approx([0.5, 1.0, 1.0, 0.625, 0.25])
