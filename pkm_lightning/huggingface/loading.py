"""A pretrained model as `pkm_lightning.load` gives a trained one: with tokenizer, chat template and context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import OmegaConf

from pkm_lightning.build.completion import complete_plugins
from pkm_lightning.build.loading import LoadedModel, context_of
from pkm_lightning.build.model import bind_tokenizer, build_model, complete_trunk, weight_dtype
from pkm_lightning.build.model import load_pretrained as start_plugins
from pkm_lightning.capacity.setting import PRECISIONS
from pkm_lightning.data.files import expanded
from pkm_lightning.data.pretrained_files import default_cache
from pkm_lightning.errors import ConfigError, check_choice
from pkm_lightning.huggingface.files import PretrainedFiles

__all__ = ["load_path", "load_pretrained"]


def load_path(path: Path, *, device: str | torch.device, precision: str | None) -> LoadedModel:
    """Returns the pretrained model at `path`, with the defaults of `model=hf`.

    Args:
        path: a folder as transformers saves it, or a GGUF file.
        device: where the model goes.
        precision: of the weights, as `trainer.precision`; None for fp32.

    Raises:
        PkmError: as `load_pretrained`, and a precision that is not known.
    """
    composed = _defaults()
    composed.model.path = str(path)
    composed.data.path = None
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
        composed.trainer.precision = precision
    config: Any = OmegaConf.to_container(composed, resolve=True)
    return load_pretrained(config, device=device)


def _defaults() -> Any:
    """Returns the configuration of `model=hf`, also within a program that Hydra has started."""
    outer = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("pkm_lightning.configs", version_base="1.3"):
            return compose("config", overrides=["model=hf", "data=text", "run_dir=null"])
    finally:
        restore_gh_from_backup(outer)


def load_pretrained(config: Mapping[str, Any], *, device: str | torch.device = "cpu") -> LoadedModel:
    """Returns the pretrained model of `config`, whose `model` is that of `model=hf`, with the plugins of `ffn`.

    Args:
        config: a composed configuration as plain dicts and lists. The weights are in the dtype of `trainer.precision`;
            those of plugins are as before a training.
        device: where the model goes.

    Raises:
        ConfigError: a model that is not supported, or an extra that is not installed.
        DataError, CheckpointError: files that are missing or damaged.
    """
    path = config["model"]["path"]
    if not isinstance(path, str):
        raise ConfigError(f"model.path={path} is no path; give that of a folder or a .gguf file.")
    # No data are read: the length of their sequences, which may be a default, is no limit of the model.
    whole = complete_plugins(complete_trunk({**config, "data": {**config["data"], "seq_len": None}}))
    with weight_dtype(whole), torch.device(device):
        model = build_model(whole)
    model.init_weights(int(whole["seed"]))
    cache_dir = whole["data"].get("cache_dir")
    files = PretrainedFiles.find(path, expanded(cache_dir) if cache_dir else default_cache())
    tokenizer = files.tokenizer
    if tokenizer is not None:
        tokenizer.begins_prompts = True
    bind_tokenizer(model, tokenizer, whole)
    start_plugins(model, whole)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=whole,
        path=Path(path),
        device=torch.device(device),
        context=context_of(whole),
        chat_template=files.chat_template,
    )
