"""Plugins from outside the package that break their contracts: one sentence that names them, before anything starts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from toys import config

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.cli.loggers import check_loggers
from pkm_lightning.data import FactsDataModule
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNCost, FFNOutput, TableSpec

#: What `Broken` does wrong; a configuration holds values only.
MISTAKES: dict[str, Any] = {
    "plain tensor": lambda y: y,
    "None": lambda y: None,
    "tuple": lambda y: (y,),
    "wide": lambda y: FFNOutput(torch.cat([y, y], -1)),
    "one value per token": lambda y: FFNOutput(y[..., :1]),
    "flat": lambda y: FFNOutput(y.flatten(0, 1)),
    "integers": lambda y: FFNOutput(y.long()),
    "detached": lambda y: FFNOutput(y.detach()),
    "fp64": lambda y: FFNOutput(y.double()),
    "y is None": lambda y: FFNOutput(None),  # type: ignore[arg-type]
    "vector loss": lambda y: FFNOutput(y, aux_losses={"mine": y.mean(-1)}),
    "float loss": lambda y: FFNOutput(y, aux_losses={"mine": 0.1}),  # type: ignore[dict-item]
    "list of losses": lambda y: FFNOutput(y, aux_losses=[y.mean()]),  # type: ignore[arg-type]
    "vector metric": lambda y: FFNOutput(y, metrics={"mine": y.mean(-1)}),
    "statistics": lambda y: FFNOutput(y, step_stats={"mine": 3}),  # type: ignore[dict-item]
    "deferred": lambda y: FFNOutput(y, deferred_BTD=y[..., :1]),
    "deferred integers": lambda y: FFNOutput(y, deferred_BTD=y.long()),
    "deferred fp64": lambda y: FFNOutput(y, deferred_BTD=y.double()),
}
#: And what it may do.
RIGHT: dict[str, Any] = {
    "right": lambda y: FFNOutput(y, aux_losses={"mine": y.mean()}, metrics={"mine": y.detach().mean()}),
    "not on meta": lambda y: FFNOutput(y * float(y.mean())),
    "defers all": lambda y: FFNOutput(torch.zeros_like(y), deferred_BTD=y),
    "loss of weight 0": lambda y: FFNOutput(y, aux_losses={"mine": y.new_zeros(())}),
}
SPECS: dict[str, Any] = {
    "right": TableSpec(rows=9, dim=4),
    "None": None,
    "0": TableSpec(rows=0, dim=4),
    "16.5": TableSpec(rows=16.5, dim=4),  # type: ignore[arg-type]
    "tuple": (9, 4),
    "std": TableSpec(rows=9, dim=4, std=float("nan")),
}
COSTS: dict[str, Any] = {"int": 3, "None": None, "text": FFNCost(params=1, active_params=1, flops="many")}  # type: ignore[arg-type]


class Broken(nn.Module):
    def __init__(self, dim: int, does: str = "right") -> None:
        super().__init__()
        self.linear, self.does = nn.Linear(dim, dim), does

    def forward(self, x_BTD: Tensor, context: Any) -> Any:
        return (MISTAKES | RIGHT)[self.does](self.linear(x_BTD))


class OneArgument(Broken):
    def forward(self, x_BTD: Tensor) -> Any:  # type: ignore[override]
        return FFNOutput(self.linear(x_BTD))


class ByName(Broken):
    def forward(self, x_BTD: Tensor, *, context: Any) -> Any:  # type: ignore[override]
        return FFNOutput(self.linear(x_BTD))


class Reading(Broken):
    def __init__(self, dim: int, table: Any, spec: str) -> None:
        super().__init__(dim)

    @classmethod
    def table_spec(cls, spec: str, **_: Any) -> Any:
        return SPECS[spec] if spec != "raises" else 1 // 0


class Costly(Broken):
    def __init__(self, dim: int, costs: str) -> None:
        super().__init__(dim)
        self.costs = costs

    def cost(self) -> Any:
        return COSTS[self.costs] if self.costs != "raises" else {}["x"]


class Listing(Broken):
    def slots(self) -> Any:
        return None

    def reads(self) -> Any:
        return [1]


class Unbuildable(Broken):
    def __init__(self, dim: int) -> None:
        raise RuntimeError("out of luck")


class Questioning(L.Callback):
    def check(self, config: Any) -> None:
        raise KeyError("mine")


class Unordered(L.Callback):
    hook_order = "first"


class NoBatches(L.LightningDataModule):
    vocab_size = 50


class WordVocabulary(FactsDataModule):
    vocab_size = "many"  # type: ignore[assignment]


def refusal(group: str, cls: type, **arguments: Any) -> str:
    """Returns the message of the configuration with `cls` in the place of `group`."""
    given = config("ffn=dense", "model.vocab_size=auto", "trainer.accelerator=cpu")
    target = {"_target_": f"{cls.__module__}.{cls.__qualname__}", **arguments}
    if group == "data" and issubclass(cls, FactsDataModule):
        target = {**given["data"], **target}
    if group == "callbacks":
        given["callbacks"] = {"mine": target}
    else:
        given[group] = target
    with pytest.raises(ConfigError) as caught:
        resolve(given, training=True)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("does", MISTAKES)
def test_outputs_are_checked_before_anything_starts(does: str) -> None:
    message = refusal("ffn", Broken, does=does)
    assert f"{__name__}.Broken breaks its contract: " in message
    assert message.endswith("(see pkm_lightning/ffn/base.py).")


@pytest.mark.parametrize("does", RIGHT)
def test_a_plugin_that_keeps_the_contract_is_taken(does: str) -> None:
    given = config("ffn=dense", "model.vocab_size=auto")
    given["ffn"] = {"_target_": f"{__name__}.Broken", "does": does}
    resolve(given, training=True)


@pytest.mark.parametrize(
    ("cls", "arguments", "expected"),
    [
        *((Reading, {"spec": spec}, "Reading.table_spec") for spec in (*SPECS, "raises") if spec != "right"),
        (Reading, {"spec": "raises"}, "raised ZeroDivisionError: integer division or modulo by zero (test_foreign_"),
        *((Costly, {"costs": costs}, "Costly") for costs in (*COSTS, "raises")),
        (Costly, {"costs": "int"}, "cost() returned int 3; return an FFNCost"),
        (Listing, {}, "slots() returned None; it returns a list of Slots"),
        (Unbuildable, {}, "the constructor of Unbuildable raised RuntimeError: out of luck (test_foreign_plugins.py, "),
    ],
)
def test_other_members_are_checked(cls: type, arguments: dict[str, Any], expected: str) -> None:
    assert expected in refusal("ffn", cls, **arguments)


@pytest.mark.parametrize(
    ("group", "cls", "expected"),
    [
        ("callbacks", nn.Identity, "callbacks.mine._target_=torch.nn.modules.linear.Identity is not a lightning."),
        ("callbacks", Questioning, "Questioning.check raised KeyError: 'mine' (test_foreign_plugins.py, line"),
        ("callbacks", Unordered, "Unordered.hook_order='first' is not a number"),
        ("data", nn.Identity, "is not a lightning.pytorch.core.datamodule.LightningDataModule"),
        ("data", NoBatches, "NoBatches has no train_dataloader"),
        ("data", WordVocabulary, "WordVocabulary.vocab_size='many' is not a number"),
    ],
)
def test_callbacks_and_data_are_checked(group: str, cls: type, expected: str) -> None:
    assert expected in refusal(group, cls)


def test_strategies_and_loggers_are_checked() -> None:
    given = config("ffn=dense", "model.vocab_size=auto", "trainer.accelerator=cpu")
    wrong = {"_target_": "torch.nn.Identity"}
    with pytest.raises(ConfigError, match=r"strategy._target_=torch.nn.Identity is not a lightning.*Strategy"):
        make_trainer({**given, "strategy": wrong}, callbacks=[], loggers=[])
    with pytest.raises(ConfigError, match=r"logger.mine._target_=torch.nn.Identity is not a lightning.*Logger"):
        check_loggers({**given, "logger": {"mine": wrong}})


@pytest.mark.parametrize("cls", [OneArgument, ByName])
def test_a_forward_that_cannot_be_called_is_refused_with_its_arguments(cls: type) -> None:
    message = refusal("ffn", cls)
    assert "breaks its contract: forward takes (x_BTD: " in message
    assert "it is called with two, forward(x_BTD, context)" in message
