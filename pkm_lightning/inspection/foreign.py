"""Models and tokenizers of transformers as what an inspection reads: trunks with plugins, and codecs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from pkm_lightning.data.base import TextCodec
from pkm_lightning.errors import ConfigError
from pkm_lightning.model.plugged_layer import plugged_layers

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


def trunk_of(model: Any) -> Transformer:
    """Returns `model` itself where it is a trunk, else a view of a model of transformers that shares its modules.

    Raises:
        ConfigError: a model without plugins of this package, or without an unembedding.
    """
    if hasattr(model, "plugins"):
        return cast("Transformer", model)
    if not hasattr(model, "modules") or not plugged_layers(model):
        raise ConfigError(
            f"a {type(model).__name__} has no plugins of this package to look at; give one that replace_ffn has put "
            "plugins into, or the model of pkm_lightning.load(PATH)."
        )
    # Imports transformers, which few programs need.
    room = importlib.import_module("pkm_lightning.huggingface.pretrained")
    return cast("Transformer", room.PretrainedTransformer.around(model))


def codec_of(tokenizer: Any) -> TextCodec:
    """Returns `tokenizer` itself where it is a codec, else a tokenizer of transformers as one.

    Raises:
        ConfigError: neither, or one without an end token.
    """
    if hasattr(tokenizer, "eos_id"):
        return cast("TextCodec", tokenizer)
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            f"a {type(tokenizer).__name__} has no end token; give the tokenizer of the model, with its eos_token set."
        )
    return _TransformersCodec(tokenizer)


class _TransformersCodec:
    """A tokenizer of transformers.

    Attributes:
        eos_id: its end token.
        vocab_size: one more than its highest id, added tokens included.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocab_size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, prompt: str) -> list[int]:
        """Returns the ids of `prompt`, behind what a text of this model begins with."""
        return list(self._tokenizer.encode(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token: int) -> str:
        """Returns the name of a token in the vocabulary."""
        return str(self._tokenizer.convert_ids_to_tokens(token))
