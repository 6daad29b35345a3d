"""The one place where a configuration becomes objects: what it passes, what it refuses, whom it trusts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from toys import Constant, Reporter, config

from pkm_lightning.build.instantiate import accepted_keywords, check_trusted, instantiate, target_class
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import Dense, MemoryPlus
from pkm_lightning.memory import ValueTable

DENSE = {"_target_": "pkm_lightning.ffn.Dense", "hidden_dim": 5}
MEMORY = {
    "_target_": "pkm_lightning.ffn.MemoryPlus",
    "_size_by_": {"flops": "value_dim"},
    "n_keys": 3,
    "heads": 1,
    "knn": 2,
    "key_dim": 4,
    "value_dim": None,
    "qk_norm": True,
}


class TakesAll(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given


def test_passes_only_what_the_class_asks_for() -> None:
    layer = instantiate(DENSE, "ffn", dim=4, layer=1, n_layers=2)
    assert isinstance(layer, Dense)
    assert (layer.out.weight.shape, layer.n_layers) == ((4, 5), 2)
    assert isinstance(instantiate({"_target_": "toys.Reporter"}, "ffn", dim=4, layer=1, n_layers=2), Reporter)
    assert isinstance(instantiate({"_target_": "toys.Constant"}, "ffn", dim=4, layer=1, n_layers=2), Constant)


def test_keywords_go_to_a_class_that_takes_all() -> None:
    assert accepted_keywords(TakesAll, {"dim": 4, "layer": 1}) == {"dim": 4, "layer": 1}
    assert accepted_keywords(Reporter, {"dim": 4, "layer": 1}) == {"dim": 4}


def test_a_table_is_handed_on_as_the_object_that_it_is() -> None:
    table = ValueTable(rows=9, dim=4)
    layer = instantiate(MEMORY, "ffn", dim=4, table=table)
    assert isinstance(layer, MemoryPlus)
    assert layer.values.table is table


def test_omegaconf_and_plain_dicts_are_equal() -> None:
    layer = instantiate(OmegaConf.create(DENSE), "ffn", dim=4, n_layers=2)
    assert layer.up.weight.shape == (5, 4)


def test_nested_targets_are_built_as_plain_containers() -> None:
    settings = {"_target_": "toys.Constant", "value": {"_target_": "torch.nn.Identity"}}
    with pytest.raises(ConfigError, match=r"the constructor of Constant raised TypeError: .*Identity"):
        instantiate(settings, "ffn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"ffn._target_ is not set; name your class"),
        ({"_target_": None}, r"ffn._target_ is not set"),
        (OmegaConf.create({"_target_": "???"}), r"ffn._target_ is not set"),
        ({"_target_": "nowhere.Thing"}, r"nowhere.Thing cannot be imported \(No module named 'nowhere'\)"),
        ({"_target_": "pkm_lightning.ffn.Dence"}, r"Dence cannot be imported \(.*no attribute 'Dence'"),
        ({"_target_": "os.system"}, r"ffn._target_=os.system is not a class"),
        ({"_target_": "collections.OrderedDict"}, r"ffn._target_=collections.OrderedDict does not declare what it"),
        ({**DENSE, "_args_": [5]}, r"ffn._args_ would pass arguments by position"),
        ({**DENSE, "hidden_dim": {**DENSE, "_args_": []}}, r"ffn.hidden_dim._args_ would pass arguments by position"),
        ({**DENSE, "hiden_dim": 5}, r"ffn: Dense got an unexpected keyword argument 'hiden_dim'; it takes: dim,"),
        ({"_target_": DENSE["_target_"]}, r"ffn: Dense missing a required .*argument: 'hidden_dim'; it takes:"),
        ({**DENSE, "dim": 8}, r"ffn.dim follows from the rest of the configuration; remove it"),
        ({**DENSE, "hidden_dim": 0}, r"ffn.hidden_dim=0 is out of range"),
    ],
)
def test_refuses(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instantiate(settings, "ffn", dim=4, layer=0, n_layers=2)


def test_target_class() -> None:
    assert target_class({"_target_": "torch.nn.Linear"}, "x") is torch.nn.Linear


def test_the_shipped_configurations_are_trusted() -> None:
    for overrides in (("ffn=memory_plus",), ("ffn=dense", "strategy=ddp"), ("data=text", "data.path=x")):
        check_trusted(config(*overrides), "config.yaml")


@pytest.mark.parametrize(
    "target",
    [
        "subprocess.Popen",
        "os.system",
        "builtins.eval",
        "toys.Constant",  # a user's class
        "nowhere.Thing",
        "torch.load",  # a function
        "pkm_lightning.build.model.build_model",
        "pkm_lightning.build.instantiate.instantiate",
        "pkm_lightning.training.machine.subprocess.Popen",  # a foreign class through a trusted path
        "torch.utils.cpp_extension.subprocess.Popen",
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",  # starts programs
        "lightning.pytorch.cli.LightningCLI",
        "torch",
        "torch.no_such_name",
        "torch:nn.Linear",
        "torchvision.models.ResNet",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_saved_configuration_may_not_name(target: str, nested: bool) -> None:
    settings = {"callbacks": {"mine": {"_target_": "pkm_lightning.ffn.Dense", "extra": [{"_target_": target}]}}}
    where = "callbacks.mine.extra[0]._target_"
    if not nested:
        settings, where = {"ffn": {"_target_": target}}, "ffn._target_"  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as error:
        check_trusted(settings, "runs/a/config.yaml")
    refusal = f"runs/a/config.yaml names {where}={target}, code that a saved configuration may not run unasked"
    assert refusal in str(error.value)
    assert "repeat the command with trust_config=true" in str(error.value)


@pytest.mark.parametrize(
    "target",
    [
        "pkm_lightning.ffn.Dense",
        "pkm_lightning.model.Placement",
        "torch.nn.Linear",
        "torch.optim.AdamW",
        "lightning.pytorch.Trainer",
        "lightning.Trainer",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.strategies.FSDPStrategy",
        "lightning.pytorch.profilers.SimpleProfiler",
    ],
)
def test_a_saved_configuration_may_name(target: str) -> None:
    check_trusted({"any": [{"where": {"_target_": target}}]}, "config.yaml")
