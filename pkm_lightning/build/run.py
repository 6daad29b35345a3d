"""A run before it starts: its completed, checked configuration, its data module and callbacks, and its model on the
meta device. Nothing is allocated or written, and the data module is only constructed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L

from pkm_lightning.build.checks import check_learning, check_trainer, check_training
from pkm_lightning.build.completion import complete_plugins
from pkm_lightning.build.finetuning import (
    check_adapted,
    check_starting_weights,
    finetuning_callbacks,
)
from pkm_lightning.build.freezing import check_frozen
from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.build.keys import check_keys
from pkm_lightning.build.length import complete_length
from pkm_lightning.build.model import (
    attention_context,
    build_meta_model,
    check_foreign_plugins,
    complete_trunk,
    start_at_zero,
)
from pkm_lightning.build.read_files import with_absolute_files
from pkm_lightning.build.replay import add_replay
from pkm_lightning.build.schedule import configured_schedule
from pkm_lightning.build.sizing import solve_size
from pkm_lightning.build.stored_tables import check_table_keys
from pkm_lightning.build.variant_figures import variant_figures
from pkm_lightning.build.variants import variants
from pkm_lightning.capacity import Plan, check_memory, check_setting, make_plan
from pkm_lightning.data.base import defines, vocab_size_of
from pkm_lightning.errors import ConfigError, check_integer, check_range
from pkm_lightning.model import ModelCost, Transformer, model_cost


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration that can be run, as `resolve` returns it.

    Attributes:
        config: plain dicts, lists and values; `model.vocab_size` and the plugin's size are numbers.
        data: the data module, neither prepared nor set up.
        model: the transformer on the meta device: shapes without memory.
        callbacks: those of the configuration in the order in which they act; empty where nothing is trained.
    """

    config: dict[str, Any]
    data: L.LightningDataModule
    model: Transformer
    callbacks: list[L.Callback] = field(default_factory=list)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights and buffers, by their names in a checkpoint."""
        return {f"model.{name}": tuple(value.shape) for name, value in self.model.state_dict().items()}

    # Made when first asked for: a plugin may state no cost, and few verbs plan.

    @cached_property
    def cost(self) -> ModelCost:
        """Parameters, FLOPs and bytes per token."""
        return model_cost(self.model, attention_context(self.config))

    @cached_property
    def of_variants(self) -> dict[str, dict[str, Any]]:
        """Layers, tables, parameters and costs of each variant; see `variant_figures`."""
        return variant_figures(self.model, self.config)

    @cached_property
    def plan(self) -> Plan:
        """What one device of the run holds and receives."""
        return make_plan(self.model, self.config)


def resolve(config: dict[str, Any], *, training: bool = False) -> ResolvedRun:
    """Fills in vocabulary and plugin size, and refuses whatever cannot work before anything starts.

    Args:
        config: the composed or saved configuration as plain dicts, lists and values.
        training: also construct the callbacks and check that tables and callbacks can train.

    Raises:
        ConfigError: the value, where it stands, and what to set instead.
    """
    config = complete_trunk(config)
    check_keys(config, training=training)
    config = complete_plugins(config)
    check_table_keys(config, training=training)
    config = with_absolute_files(config)
    check_trainer(config["trainer"])
    data = instantiate(config["data"], "data")
    check_kind(data, L.LightningDataModule, config["data"], "data")
    if training and not defines(data, "train_dataloader"):
        raise ConfigError(f"data._target_={config['data']['_target_']} has no train_dataloader to train on; add it.")
    config = complete_length(config, data)
    if training:
        check_starting_weights(config)
        add_replay(data, config)
    config = {**config, "model": {**config["model"], "vocab_size": _vocab_size(config, data)}}
    check_learning(config)
    config = solve_size(config)
    model = build_meta_model(config)
    check_foreign_plugins(model, config)
    check_frozen(model, config)
    if training:
        check_adapted(model, config)
    start_at_zero(model, config)  # for its checks only
    check_setting(model, config)
    # For its checks only.
    configured_schedule(config["optim"], config["trainer"]["max_steps"])
    callbacks = make_callbacks(config) if training else []
    run = ResolvedRun(config, data, model, callbacks)
    if training:
        check_training(config, callbacks)
        if config.get("device_memory") is not None:
            check_memory(run.plan, config["device_memory"] * 1e9, model, config)
    return run


def make_callbacks(config: dict[str, Any]) -> list[L.Callback]:
    """Returns the configured callbacks by their `hook_order`, equal ones in the order of the configuration."""
    callbacks = []
    for name, entry in (config["callbacks"] or {}).items():
        if entry:
            callback = instantiate(entry, f"callbacks.{name}")
            check_kind(callback, L.Callback, entry, f"callbacks.{name}")
            check_range(f"callbacks.{name}: {type(callback).__name__}.hook_order", getattr(callback, "hook_order", 0))
            callbacks.append(callback)
    callbacks += finetuning_callbacks(config)
    return sorted(callbacks, key=lambda callback: getattr(callback, "hook_order", 0))


def _vocab_size(config: dict[str, Any], data: L.LightningDataModule) -> int:
    configured, needed = config["model"]["vocab_size"], vocab_size_of(data)
    if needed is not None:
        check_integer(f"data: {type(data).__name__}.vocab_size", needed, 1)
    if configured == "auto":
        if needed is None:
            raise ConfigError(
                f"model.vocab_size=auto, but {type(data).__name__} has no vocab_size; set model.vocab_size to a number."
            )
        return int(needed)
    if not isinstance(configured, int) or isinstance(configured, bool):
        raise ConfigError(f"model.vocab_size={configured!r} is neither auto nor a number.")
    if needed is not None and configured < needed:
        raise ConfigError(
            f"model.vocab_size={configured} is too small: the data's tokens need {needed}; {_with_tokenizer(config)}"
            "set model.vocab_size=auto or lower data.vocab_size."
        )
    return configured


def _with_tokenizer(config: dict[str, Any]) -> str:
    """Returns the advice to take the tokenizer in the folder of a pretrained plugin; empty where there is none."""
    if "tokenizer" not in config["data"]:
        return ""
    paths = [str(variant.ffn["path"]) for variant in variants(config) if variant.ffn.get("path")]
    others = [path for path in paths if path != config["data"]["tokenizer"]]
    folder = next((path for path in others if (Path(path) / "tokenizer.json").is_file()), None)
    return "" if folder is None else f"set data.tokenizer={folder}, the tokenizer of that folder; otherwise "
