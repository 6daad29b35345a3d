"""The data of a saved run for a command that does not train: what the run has kept, unless the command names others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.checkpoints.companions import TOKENIZER, companion_place, find_companion
from pkm_lightning.cli.resume import missing_data_keys
from pkm_lightning.cli.run_contents import HELD_OUT
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.datamodule import LoaderOptions, TokenDataModule
from pkm_lightning.data.held_out import is_held_out_of
from pkm_lightning.errors import ConfigError

#: Keys of `data` that do not change which sequences there are.
_NEUTRAL = ("prompts", "prompts_file", "num_workers", "global_batch_size", "order_seed", "cache_dir")
#: Keys of `data` that answers depend on.
_OF_PROMPTS = ("data.prompts", "data.prompts_file", "data.tokenizer", "data.cache_dir")
_LOADERS = ("val_dataloader", "test_dataloader", "predict_dataloader")


def with_kept_data(
    config: dict[str, Any], weights: Path, fingerprint: str | None, verb: str, overrides: Iterable[str]
) -> dict[str, Any]:
    """Returns `config` with the tokenizer that lies beside `weights`, and the held-out data that their run has kept.

    Args:
        config: of the saved run, with the command's overrides on top.
        weights: the checkpoint or exported file.
        fingerprint: of the data that it was trained on; held-out data of others are not taken. None: not known.
        verb: `predict` needs no held-out data, only the tokenizer.
        overrides: those of the command; one that names other data is obeyed.
    """
    data, tokenizer = config.get("data", {}), find_companion(weights, TOKENIZER)
    if tokenizer is None or not LoaderOptions.__required_keys__ <= data.keys():
        return config
    keys = [key_of(override) for override in overrides]
    if verb == "predict" and not _has_own_loaders(data):
        _check_prompts_only(keys)
    named = [key for key in keys if key.partition(".")[0] == "data" and key.removeprefix("data.") not in _NEUTRAL]
    folder = companion_place(weights, HELD_OUT)
    is_kept = is_held_out_of(folder, fingerprint)
    if not named and (is_kept or verb == "predict") and not _has_own_loaders(data):
        options = {key: data[key] for key in LoaderOptions.__required_keys__}
        held_out = {
            "_target_": "pkm_lightning.data.HeldOutDataModule",
            "folder": str(folder) if is_kept else None,
            **options,
            "tokenizer": str(tokenizer),
            "vocab_size": data.get("vocab_size", 0),  # that of the tokenizer counts
        }
        return {**config, "data": held_out}
    missing = missing_data_keys(data)
    if missing:
        raise ConfigError(
            f"{missing[0]} is not set: the run was started by an earlier version, whose data did not have it; choose "
            "the data anew, as in data=text data.path=FILE."
        )
    # The same words must have the same ids: a vocabulary learned from other text would be another one.
    # Data that lie in shards have their own.
    return (
        config
        if "data.tokenizer" in keys or "tokenizer" not in data
        else {**config, "data": {**data, "tokenizer": str(tokenizer)}}
    )


def _check_prompts_only(keys: Iterable[str]) -> None:
    """Refuses keys of data that answers to prompts do not depend on.

    Raises:
        ConfigError: naming the first of them.
    """
    idle = [key for key in keys if key.split(".")[0].split("/")[0].split("@")[0] == "data" and key not in _OF_PROMPTS]
    if idle:
        raise ConfigError(
            f"predict does not read {idle[0]}, of data only {', '.join(_OF_PROMPTS)}; leave it out (extrapolate=true "
            "reads beyond the length of training)."
        )


def _has_own_loaders(data: Mapping[str, Any]) -> bool:
    """Returns whether the data module reads its held-out data or its prompts in a way of its own."""
    try:
        cls = target_class(data, "data")
    except ConfigError:  # its module is not at hand
        return False
    return not issubclass(cls, TokenDataModule) or any(
        is_overridden(name, object.__new__(cls), TokenDataModule) for name in _LOADERS
    )
