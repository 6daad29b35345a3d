"""What a folder describes: plain Llama, the pretrained model that was trained, with its plugins, or our own class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.build.loading import context_of, with_table_device
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.checkpoints.companions import MODEL_TYPE
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.checkpoints.reader import SavedCheckpoint, later_buffers
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.huggingface.folder_keys import CLASS, GROUPS, OPTIONAL_GROUP
from pkm_lightning.huggingface.llama import is_llama, llama_config, llama_names
from pkm_lightning.huggingface.plugged_folder import NETWORK, check_rows_at_hand, plugged_config, plugged_names
from pkm_lightning.model import Transformer

#: Before the names of weights in a checkpoint.
_WEIGHTS = "state_dict.model."


@dataclass(frozen=True)
class Architecture:
    """The content of config.json, and the names of the weights.

    Attributes:
        config: content of config.json.
        names: name in the folder of each weight; None where the folder is this package's and keeps the names.
        needs_package: whether transformers knows the class from this package only.
    """

    config: dict[str, Any]
    names: dict[str, str] | None
    needs_package: bool = False

    @property
    def loaded_by(self) -> str:
        """The name of the class that loads the folder."""
        return str((self.config.get("architectures") or [self.config["model_type"]])[0])


def describe(saved: SavedCheckpoint, content: SavedCheckpoint | QuantizedCheckpoint) -> Architecture:
    """Returns the architecture of `content`, which is `saved` or `saved` with quantised tables.

    Raises:
        CheckpointError: weights that do not fit the configuration, or one without what decides the model.
    """
    model = _shapes(saved)
    config = content.skeleton["hyper_parameters"]["config"]
    context = context_of(config)
    length = {} if context is None else {"max_position_embeddings": context}
    if isinstance(model, Transformer) and is_llama(model):
        return Architecture({**llama_config(model), **length}, llama_names(model))
    pretrained = config["model"].get("architecture")
    if model is not None and isinstance(pretrained, dict):
        # `auto_map` is for code in the folder that the model came from, which was not run.
        known = {key: value for key, value in pretrained.items() if key != "auto_map"}
        weights = [name.removeprefix(_WEIGHTS) for name in content.shapes if name.startswith(_WEIGHTS)]
        if any(True for _ in model.plugins()):
            check_rows_at_hand(model, f"ckpt={saved.path}")
            # In this module transformers is imported, which a pretrained model has needed already.
            causal_class = importlib.import_module("pkm_lightning.huggingface.plugged").causal_class
            described = plugged_config(config, known, causal_class(known["model_type"]))
            return Architecture(described, plugged_names(config, model, weights), needs_package=True)
        return Architecture(known, {name: name.removeprefix(NETWORK) for name in weights})
    return Architecture({**_class_config(config), **length}, None, needs_package=True)


def _shapes(checkpoint: SavedCheckpoint) -> Any:
    """Returns the model without memory, whose weights the checkpoint holds; None if it has classes of the user's own.

    These are constructed when the folder is loaded by someone who trusts it.
    """
    config = checkpoint.config
    absent = [group for group in GROUPS if not isinstance(config.get(group), dict)]
    if absent:
        raise CheckpointError(f"ckpt={checkpoint.path} has a configuration without {absent[0]}, which is of no model.")
    try:
        check_trusted(_groups(config), str(checkpoint.path))
    except ConfigError:
        return None
    model = build_meta_model(config)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoint.check_weights(shapes, later_buffers(model, "model."))
    return model


def _groups(config: Mapping[str, Any]) -> dict[str, Any]:
    groups = {group: config[group] for group in GROUPS}
    return {**groups, OPTIONAL_GROUP: config[OPTIONAL_GROUP]} if config.get(OPTIONAL_GROUP) else groups


def _class_config(config: Mapping[str, Any]) -> dict[str, Any]:
    groups = with_table_device(_groups(config), "auto")
    # Of the machine and the training: in transformers its own optimizer learns the table, on the model's device.
    groups["model"] = {**groups["model"], "compile": False, "activation_checkpointing": False}
    if "learning" in groups["table"]:  # a quantised table does not learn
        groups["table"]["learning"] = "dense"
    return {"model_type": MODEL_TYPE, "architectures": [CLASS], "transformer": groups}
