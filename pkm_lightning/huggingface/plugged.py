"""Models of transformers with plugins as folders: config.json names the plugins, and a class builds them again.

Their `model_type` is one of this package, `pkm_lightning_llama` for example: without this package transformers refuses
the folder, instead of loading the model without its memory.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from pkm_lightning.build.hosts import Host
from pkm_lightning.build.instantiate import check_trusted, target_class
from pkm_lightning.build.replacement import PluginRequest
from pkm_lightning.checkpoints.companions import PLUGGED_TYPE
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.huggingface.folder_keys import PLUGGED_CLASS
from pkm_lightning.huggingface.plugged_decoder import follow

_KEY = "pkm_lightning"


class PluggedConfig:
    """What the configuration of a model with plugins has beside that of the model.

    Attributes:
        trunk_type: the `model_type` of the model without plugins.
        pkm_lightning: `placements`, an entry per call of `replace_ffn`, in which `tables` names what registers the
            tables: `model`, or its `decoder`.
    """

    trunk_type: str
    pkm_lightning: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, with the names of the classes that build the plugins."""
        content: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        names = content.get("architectures") or []
        content["architectures"] = [PLUGGED_CLASS + name.removeprefix(PLUGGED_CLASS) for name in names]
        return content


def _config(base: Any) -> Any:
    members = {
        "__module__": __name__,
        "__annotations__": {_KEY: dict[str, Any] | None},
        "model_type": PLUGGED_TYPE + base.model_type,
        "trunk_type": base.model_type,
        _KEY: None,
    }
    return type(PLUGGED_CLASS + base.__name__, (PluggedConfig, base), members)


PluggedGPT2Config = _config(GPT2Config)
PluggedLlamaConfig = _config(LlamaConfig)
PluggedMistralConfig = _config(MistralConfig)
PluggedQwen2Config = _config(Qwen2Config)
PluggedQwen3Config = _config(Qwen3Config)
#: By `model_type` of the model without plugins.
CONFIGS: dict[str, Any] = {
    config.trunk_type: config
    for config in (PluggedGPT2Config, PluggedLlamaConfig, PluggedMistralConfig, PluggedQwen2Config, PluggedQwen3Config)
}


class PluggedModel:
    """A model of transformers whose configuration names plugins.

    Args:
        config: with `pkm_lightning`.
        trust_config: whether it may name classes outside of pkm_lightning, lightning and torch, such as a plugin of
            your own; `from_pretrained(folder, trust_config=True)` passes it on.

    Raises:
        ConfigError: a class that may not be named or cannot be imported, or sizes that do not fit.
    """

    def __init__(self, config: Any, *arguments: Any, trust_config: bool = False, **options: Any) -> None:
        super().__init__(config, *arguments, **options)  # type: ignore[call-arg]
        described = config.pkm_lightning
        place = f"{config.name_or_path}/config.json" if config.name_or_path else "the configuration"
        entries = described.get("placements") if isinstance(described, dict) else None
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise CheckpointError(f"{place} names no plugins (pkm_lightning.placements); save the model again.")
        if not trust_config:
            check_trusted(described, place, "load it with from_pretrained(folder, trust_config=True)")
        assert isinstance(self, nn.Module)
        decoder: Any = self.base_model
        for entry in described["placements"]:
            host = Host.of(decoder if entry.get("tables") == "decoder" else self)
            request = read(entry, host, place)
            try:
                plugins, tables = request.make(host)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
            host.replace(dict(zip(request.layers, plugins, strict=True)), request.mode, tables)
        follow(decoder)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Returns the model of a folder, as any `from_pretrained` does.

        Raises:
            CheckpointError: the folder lacks weights, which would otherwise start at random.
        """
        wanted = options.pop("output_loading_info", False)
        options.setdefault("use_safetensors", True)  # the other format is a pickle
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{model.config.name_or_path} describes weights that it lacks ({missing[0]}); save the model again."
            )
        return (model, info) if wanted else model


def _model(base: Any, config: Any) -> Any:
    members = {
        "__module__": __name__,
        "config_class": config,
        # The classes of its layers, which are not divided between devices.
        "_no_split_modules": [PLUGGED_CLASS + name for name in base._no_split_modules] + base._no_split_modules,
    }
    return type(PLUGGED_CLASS + base.__name__, (PluggedModel, base), members)


PluggedGPT2LMHeadModel = _model(GPT2LMHeadModel, PluggedGPT2Config)
PluggedLlamaForCausalLM = _model(LlamaForCausalLM, PluggedLlamaConfig)
PluggedMistralForCausalLM = _model(MistralForCausalLM, PluggedMistralConfig)
PluggedQwen2ForCausalLM = _model(Qwen2ForCausalLM, PluggedQwen2Config)
PluggedQwen3ForCausalLM = _model(Qwen3ForCausalLM, PluggedQwen3Config)
PluggedGPT2Model = _model(GPT2Model, PluggedGPT2Config)
PluggedLlamaModel = _model(LlamaModel, PluggedLlamaConfig)
PluggedMistralModel = _model(MistralModel, PluggedMistralConfig)
PluggedQwen2Model = _model(Qwen2Model, PluggedQwen2Config)
PluggedQwen3Model = _model(Qwen3Model, PluggedQwen3Config)
CAUSAL_MODELS = (
    PluggedGPT2LMHeadModel,
    PluggedLlamaForCausalLM,
    PluggedMistralForCausalLM,
    PluggedQwen2ForCausalLM,
    PluggedQwen3ForCausalLM,
)
DECODERS = (PluggedGPT2Model, PluggedLlamaModel, PluggedMistralModel, PluggedQwen2Model, PluggedQwen3Model)


def causal_class(kind: str) -> str:
    """Returns the name of the class of a language model of this `model_type`, without plugins."""
    (model,) = (model for model in CAUSAL_MODELS if model.config_class is CONFIGS[kind])
    return str(model.__name__).removeprefix(PLUGGED_CLASS)


def record(model: Any, request: PluginRequest) -> None:
    """Makes the configuration of `model` name plugins that were put into it, and its decoder give them their tokens."""
    decoder, plain = model.base_model, model.config
    follow(decoder)
    if not isinstance(plain, PluggedConfig):
        # Other models may have been made of the same object.
        model.config = copy.deepcopy(plain)
        model.config.__class__ = CONFIGS[plain.model_type]
        for module in model.modules():
            if vars(module).get("config") is plain:
                module.config = model.config
    described = getattr(model.config, _KEY, None) or {"placements": []}
    entry = {**write(request), "tables": "decoder" if decoder is model else "model"}
    setattr(model.config, _KEY, {**described, "placements": [*described["placements"], entry]})


def write(request: PluginRequest) -> dict[str, Any]:
    """Returns the entry of config.json that describes plugins."""
    cls, options = request.ffn, dict(request.options)
    try:
        json.dumps(options)
    except TypeError as error:
        options = {"unsaved": f"an argument of {cls.__name__} is none of JSON ({error})"}
    # Where a public name leads to a class it survives a move of files.
    own = importlib.import_module("pkm_lightning.ffn")
    public = cls.__module__.startswith("pkm_lightning.ffn.") and getattr(own, cls.__name__, None) is cls
    module = "pkm_lightning.ffn" if public else cls.__module__
    return {
        "ffn": {"_target_": f"{module}.{cls.__qualname__}", **options},
        "layers": list(request.layers),
        "mode": request.mode,
        "shared": request.shared,
        "bits": request.bits,
    }


def read(entry: Mapping[str, Any], host: Host, place: str) -> PluginRequest:
    """Returns the plugins that an entry of config.json describes.

    Args:
        entry: as `write` returns it.
        host: that receives them.
        place: where it was read, for errors.

    Raises:
        ConfigError: a class that cannot be imported, or what `host` does not have.
        CheckpointError: an entry of another form, or of plugins that could not be described.
    """
    ffn = entry.get("ffn")
    if not isinstance(ffn, Mapping) or "layers" not in entry:
        raise CheckpointError(f"{place} has a placement without ffn and layers ({entry!r:.60}); save the model again.")
    if "unsaved" in ffn:
        raise CheckpointError(
            f"{place} cannot describe its plugins: {ffn['unsaved']}; make the model again by replace_ffn, and give it "
            "the weights of the folder."
        )
    options = {name: value for name, value in ffn.items() if not name.startswith("_")}
    further = {"shared": bool(entry.get("shared")), "bits": entry.get("bits")}
    try:
        cls = target_class(ffn, "ffn")
        return PluginRequest.of(host, cls, entry["layers"], entry.get("mode", "replace"), options, **further)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
