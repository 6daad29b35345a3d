"""The sizes of n-gram tables by the config.json of a Qwen model (`qwen4_exp` of transformers)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.errors import CheckpointError, ConfigError, check_integer, check_range, nearest
from pkm_lightning.storage import open_regular

#: Values of `model_type`; the first holds the decoder's configuration under `text_config`.
MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text")
#: What transformers takes where config.json leaves a value out.
_DEFAULTS: dict[str, Any] = {
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "ple_conv_kernel_size": 4,
    "seed": 1234,
    "hc_count": 4,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class NGramSizes:
    """The sizes of the layers with an n-gram table by their config.json.

    Attributes:
        layers: their numbers, from 0.
        vocab_size: of the tokens that are hashed.
        hidden_size: values per residual stream C.
        streams: residual streams S.
        order: largest order M; all from 2 on have heads.
        heads: heads per order.
        row_dim: values per row V.
        rows: base size of a head's range of rows.
        row_multiple: a multiple of which is the number of rows of a table.
        kernel: taps of the convolution.
        seed: of the hash.
        norm_eps: of the norms.
        end_id: the token that ends a document.
    """

    layers: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    streams: int
    order: int
    heads: int
    row_dim: int
    rows: int
    row_multiple: int
    kernel: int
    seed: int
    norm_eps: float
    end_id: int

    @property
    def reads(self) -> int:
        """Reads per token K."""
        return (self.order - 1) * self.heads


def read_config(path: Path, source: str) -> dict[str, Any]:
    """Returns the configuration of the decoder in the config.json of a folder.

    Args:
        path: of the folder.
        source: what the path is called in messages.

    Raises:
        ConfigError: no folder, or one of another kind of model.
        CheckpointError: it cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{source} is no folder; give the folder of a Qwen model, with config.json and *.safetensors."
        )
    try:
        with open_regular(path / "config.json", encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON"
        raise CheckpointError(f"{source}: its config.json cannot be read ({reason}); fetch it again.") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"{source} is of model_type={kind!r}, whose layout of n-gram tables is not known; supported: "
            f"{', '.join(MODEL_TYPES)}.{nearest(str(kind), MODEL_TYPES)}"
        )
    text: dict[str, Any] = config.get("text_config") or {} if kind == MODEL_TYPES[0] else config
    return text


def read_sizes(config: Mapping[str, Any], source: str) -> NGramSizes:
    """Returns the sizes in the content of a config.json.

    Raises:
        ConfigError: there is no layer with a table, or a value that is missing or out of range.
    """
    config = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}

    def size(name: str, low: int = 1) -> int:
        if name not in config:
            raise ConfigError(f"{source}: its config.json has no {name}; give the folder of a whole model.")
        check_integer(f"{source}: {name}", config[name], low=low)
        return int(config[name])

    listed = config.get("ple_layer_ids") or []
    if not isinstance(listed, list) or not all(type(layer) is int and layer >= 1 for layer in listed):
        raise ConfigError(f"{source}: ple_layer_ids={listed} is no list of layer numbers from 1 on.")
    if not listed:
        raise ConfigError(f"{source} has no layer with an n-gram table (ple_layer_ids is empty); give another model.")
    check_range(f"{source}: rms_norm_eps", config["rms_norm_eps"], 0)
    order, heads = size("ngram_size", low=2), size("heads_per_ngram")
    width = size("ple_embed_dim" if "ple_embed_dim" in config else "hidden_size")
    reads = (order - 1) * heads
    if width % reads:
        raise ConfigError(f"{source}: ple_embed_dim={width} is no multiple of its {reads} reads per token.")
    # Of several end tokens the first separates documents, as in transformers.
    if isinstance(ends := config.get("eos_token_id"), list) and ends:
        config["eos_token_id"] = ends[0]
    return NGramSizes(
        layers=tuple(sorted({layer - 1 for layer in listed})),
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        streams=size("hc_count"),
        order=order,
        heads=heads,
        row_dim=width // reads,
        rows=size("ngram_vocab_size_base"),
        row_multiple=size("make_ngram_vocab_size_divisible_by"),
        kernel=size("ple_conv_kernel_size"),
        seed=size("seed", low=0),
        norm_eps=float(config["rms_norm_eps"]),
        end_id=size("eos_token_id", low=0),
    )
