"""Checks of a configuration that need no model; sizes are checked by `pkm_lightning.capacity`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Protocol, runtime_checkable

import lightning as L
import yaml

from pkm_lightning.build.freezing import TRUNK
from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.build.optimizer import check_optimizer
from pkm_lightning.build.variants import plugin_variants
from pkm_lightning.capacity.setting import PRECISIONS, precision_name
from pkm_lightning.errors import ConfigError, check_choice
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.model.plugin_checks import called

Config = Mapping[str, Any]


@runtime_checkable
class ChecksConfig(Protocol):
    """A callback that does not work with every configuration."""

    def check(self, config: Config) -> None:
        """Refuses what cannot work together; called on the constructed callback, before a model or a file is made.

        Args:
            config: the complete configuration, as plain dicts, lists and numbers.

        Raises:
            ConfigError: naming the key, its value, and what to set instead.
        """


def check_trainer(trainer: Config) -> None:
    """Refuses arguments of Lightning's Trainer that would do something else here than they promise.

    Raises:
        ConfigError: with the key, the value and what to set instead.
    """
    check_clipping(trainer.get("gradient_clip_algorithm"))
    check_choice("trainer.precision", precision_name(trainer["precision"]), PRECISIONS)
    if trainer.get("overfit_batches"):
        raise ConfigError(
            f"trainer.overfit_batches={trainer['overfit_batches']} is not offered: the data module orders the data and "
            "would give other batches in every epoch; train on less data instead, as with data.people=2 or a small "
            "file."
        )


def remark_validation(trainer: Config) -> str | None:
    """Returns a remark if no validation falls within the run, which is easily overlooked; None if one does."""
    interval, accumulate = trainer["val_check_interval"], trainer["accumulate_grad_batches"]
    batches = trainer["max_steps"] * accumulate
    if trainer.get("check_val_every_n_epoch") is not None or not isinstance(interval, int) or interval <= batches:
        return None
    return (
        f"trainer.val_check_interval={interval} is beyond the {batches} micro-batches of the run, so that nothing is "
        "validated while it trains"
    )


def remark_rate(config: Config) -> str | None:
    """Returns a remark if the learning rate would destroy pretrained weights within a few steps; None if not."""
    rate, is_frozen = config["optim"]["lr"], TRUNK in (config["optim"].get("freeze") or ())
    # Only a pretrained model names its class: the package's own is described by its sizes.
    if config["model"].get("_target_") is None or rate <= 0.001 or is_frozen:
        return None
    return f"optim.lr={rate} destroys pretrained weights within a few steps; try optim.lr=0.00002"


def remark_replaced(config: Config) -> str | None:
    """Returns a remark if variants replace the FFNs of pretrained layers; None if not."""
    if config["model"].get("_target_") is None:
        return None
    n_layers = int(config["model"]["n_layers"])
    of_variants = [v.layers(n_layers) for v in plugin_variants(config) if v.placement.mode == "replace"]
    if not any(of_variants):
        return None
    layers = ", ".join(map(str, sorted(set().union(*of_variants))))
    return (
        f"placement.mode=replace removes the pretrained FFN of the layers {layers} and what it knew, until "
        "the new one has learned; placement.mode=parallel keeps both"
    )


def remark_row_optimizer(config: Config) -> str | None:
    """Returns a remark if the row optimizer has been changed although no table learns by it; None if not."""
    table = config["table"]
    if table.get("learning", "dense") != "dense":
        return None
    configured, defaults = table.get("optimizer") or {}, _default_row_optimizer()
    changed = [name for name, value in configured.items() if name in defaults and value != defaults[name]]
    if not changed:
        return None
    setting = f"table/optimizer={configured['rule']}" if "rule" in changed else f"table.optimizer.{changed[0]}"
    return f"{setting} has no effect with table.learning=dense: optim.optimizer updates the tables"


@functools.cache
def _default_row_optimizer() -> Config:
    """Returns the keys of the option of `table/optimizer` that `table` has where a command chooses none."""
    folder = resources.files("pkm_lightning.configs") / "table"
    (chosen,) = (entry for entry in _yaml(folder / "default.yaml")["defaults"] if isinstance(entry, dict))
    return _yaml(folder / "optimizer" / f"{chosen['optimizer']}.yaml")


def _yaml(file: Traversable) -> Config:
    content: Config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def check_clipping(algorithm: str | None) -> None:
    """Refuses to clip gradients by value: tables and dense parameters are clipped by norms of their own.

    Raises:
        ConfigError: naming what is offered.
    """
    if algorithm == "value":
        raise ConfigError("trainer.gradient_clip_algorithm=value is not offered; allowed: norm.")


def check_learning(config: Config) -> None:
    """Refuses settings with which the tables cannot learn in the configured way.

    Raises:
        ConfigError: with the setting, and what to set instead.
    """
    table, optim, trainer = config["table"], config["optim"], config["trainer"]
    learning = table.get("learning", "dense")
    if learning == "fused":
        raise ConfigError(
            "table.learning=fused is no longer offered; set table.learning=rows, which makes the same updates in the "
            "same time. A run that was trained with it can be evaluated and exported, but not continued."
        )
    check_choice("table.learning", learning, ("dense", "rows"))
    if learning == "dense":
        return
    rows: RowOptimizer = instantiate(table["optimizer"], "table.optimizer")
    rows.check_decay(optim["table_weight_decay"])
    if str(trainer["precision"]).startswith("16"):
        raise ConfigError(
            f"trainer.precision={trainer['precision']} does not work with table.learning={learning}: its loss scaling "
            "knows no staged gradients; set trainer.precision=bf16-mixed, or table.learning=dense."
        )


def check_training(config: Config, callbacks: Iterable[L.Callback]) -> None:
    """Refuses what can be evaluated but not trained, and what a callback cannot work with.

    Raises:
        ConfigError: a quantised table, weights in fp16, or a callback's own refusal.
    """
    precision = config["trainer"]["precision"]
    if precision_name(precision) == "16-true":
        raise ConfigError(
            f"trainer.precision={precision} cannot train: small gradients, and AdamW's epsilon, are 0 in fp16 weights; "
            "set trainer.precision=bf16-true, or 16-mixed with table.learning=dense, which scales the loss."
        )
    if config["table"]["_target_"] == "pkm_lightning.memory.QuantizedTable":
        raise ConfigError(
            f"table.bits={config['table'].get('bits')}: a quantised table is read only and cannot be trained; train "
            "with table._target_=pkm_lightning.memory.ValueTable and quantise the run when you export it."
        )
    check_optimizer(config["optim"])
    for callback in callbacks:
        if isinstance(callback, ChecksConfig):
            called(f"{type(callback).__name__}.check", callback.check, config=config)
