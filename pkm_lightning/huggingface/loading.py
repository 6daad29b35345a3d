"""A pretrained model as `pkm_lightning.load` gives a trained one: with tokenizer, chat template and context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.build.loading import LoadedModel, context_of
from pkm_lightning.build.model import build_model, complete_trunk, weight_dtype
from pkm_lightning.data.files import expanded
from pkm_lightning.data.pretrained_files import default_cache
from pkm_lightning.errors import ConfigError
from pkm_lightning.huggingface.files import PretrainedFiles

__all__ = ["load_pretrained"]


def load_pretrained(config: Mapping[str, Any], *, device: str | torch.device = "cpu") -> LoadedModel:
    """Returns the pretrained model of `config`, whose `model` is that of `model=hf`.

    Args:
        config: a composed configuration as plain dicts and lists. The weights are in the dtype of `trainer.precision`.
        device: where the model goes.

    Raises:
        ConfigError: a model that is not supported, or an extra that is not installed.
        DataError, CheckpointError: files that are missing or damaged.
    """
    path = config["model"]["path"]
    if not isinstance(path, str):
        raise ConfigError(f"model.path={path} is no path; give that of a folder or a .gguf file.")
    whole = complete_trunk(dict(config))
    with weight_dtype(whole), torch.device(device):
        model = build_model(whole)
    model.init_weights(int(whole["seed"]))
    cache_dir = whole["data"].get("cache_dir")
    files = PretrainedFiles.find(path, expanded(cache_dir) if cache_dir else default_cache())
    tokenizer = files.tokenizer
    if tokenizer is not None:
        tokenizer.begins_prompts = True
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=whole,
        path=Path(path),
        device=torch.device(device),
        context=context_of(whole),
        chat_template=files.chat_template,
    )
