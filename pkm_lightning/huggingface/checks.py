"""Refuses what a pretrained model cannot be combined with, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.build.kinds import keyword_annotations
from pkm_lightning.build.variants import EXTRAS, OWN_FFN
from pkm_lightning.data.files import expanded
from pkm_lightning.data.pretrained_files import default_cache
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import ConfigError
from pkm_lightning.huggingface.files import PretrainedFiles


def check_ffn(config: Mapping[str, Any]) -> None:
    """Refuses what plugins in a pretrained model cannot do.

    Raises:
        ConfigError: naming the key, its value and what to set instead.
    """
    base = (config.get("model") or {}).get("base_ffn")
    if base:
        raise ConfigError(
            f"model.base_ffn={str(base.get('_target_')).rpartition('.')[2]} cannot be put into a pretrained model, "
            "whose layers keep their own FFN; leave ffn@model.base_ffn out of the command."
        )
    if config.get("match", "none") != "none":
        raise ConfigError(
            f"match={config['match']} sizes an FFN by that of the package's own model, which a pretrained model does "
            "not have; leave match out, and set the sizes of ffn, such as ffn.n_keys."
        )
    of_main = config.get("placement") or {}
    if (config.get("ffn") or {}).get("_target_") != OWN_FFN and of_main.get("write_after", 0) != 0:
        delay = "null" if of_main["write_after"] is None else of_main["write_after"]
        raise ConfigError(
            f"placement.write_after={delay} is not offered in a pretrained model, whose layers add an output where it "
            "is computed; set placement.layers=[LAYER,...] placement.mode=parallel placement.write_after=0."
        )


def with_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with the pretrained model's sizes where a YAML takes them from `model`, which had none so far.

    Args:
        config: the whole configuration, completed by what the model's files say.
    """
    model = config["model"]
    sizes = {"hidden_dim": model.get("ffn_dim"), "norm_eps": model.get("norm_eps")}
    sizes["dense_hidden_dim"] = sizes["hidden_dim"]

    def completed(ffn: dict[str, Any]) -> dict[str, Any]:
        kinds = keyword_annotations(target_class(ffn, "ffn"))
        # Where null is no value of the key itself.
        absent = [key for key in sizes if key in ffn and ffn[key] is None and kinds.get(key) in (int, float)]
        return {**ffn, **{key: sizes[key] for key in absent}}

    extras = {
        name: {**extra, "ffn": completed(extra["ffn"])} for name, extra in (config.get(EXTRAS) or {}).items() if extra
    }
    return {**config, "ffn": completed(config["ffn"]), **({EXTRAS: extras} if extras else {})}


def check_data(config: Mapping[str, Any], files: PretrainedFiles, settings: Any) -> None:
    """Refuses a tokenizer of another model, and sequences longer than the positions that the model has learned.

    Args:
        config: the whole configuration.
        files: of the model.
        settings: its configuration in transformers.

    Raises:
        ConfigError: naming the key of `data`.
    """
    data = config.get("data") or {}
    length = data.get("seq_len")
    if settings.model_type == "gpt2" and isinstance(length, int) and length > settings.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len={length} is more than the {settings.max_position_embeddings} positions that "
            f"{files.path.name} has learned; set data.seq_len={settings.max_position_embeddings} or less."
        )
    tokenizer = files.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > settings.vocab_size:
        raise ConfigError(
            f"model.path={files.path} has a tokenizer of {tokenizer.vocab_size} tokens for an embedding of "
            f"{settings.vocab_size}; it is that of another model."
        )
    chosen = data.get("tokenizer")
    if tokenizer is None or not isinstance(chosen, str) or _is_same(Path(chosen), files):
        return
    if _digest(chosen, data) != tokenizer.digest:
        raise ConfigError(
            f"data.tokenizer={chosen} is the tokenizer of another model: its ids mean other words than those of "
            f"model.path={files.path}; leave data.tokenizer out, which takes the model's own."
        )


def _is_same(path: Path, files: PretrainedFiles) -> bool:
    return expanded(str(path)).absolute() in (files.path, files.folder, files.folder / "tokenizer.json")


def _digest(chosen: str, data: Mapping[str, Any]) -> str | None:
    """Returns the digest of `data.tokenizer`; None for one that will be learned from the data."""
    cache_dir = data.get("cache_dir")
    options = {**data, "tokenizer": chosen, "vocab_size": int(data.get("vocab_size") or 0)}
    choice = TokenizerChoice.of(options, expanded(cache_dir) if cache_dir else default_cache())
    return None if chosen == "bpe" else choice.make(lambda: ()).digest
