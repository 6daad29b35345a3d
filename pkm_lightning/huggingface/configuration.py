"""The configuration of a model of this package as transformers keeps it: config.json holds our own groups as values."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pkm_lightning.checkpoints.companions import MODEL_TYPE
from pkm_lightning.huggingface.folder_keys import GROUPS

__all__ = ["PkmLightningConfig"]


class PkmLightningConfig(PreTrainedConfig):
    """The groups of a resolved configuration that decide the model.

    Args:
        transformer: the groups `model`, `ffn`, `placement`, `table` and, for a mixture, `extra_ffns` as plain values.
        max_position_embeddings: tokens per sequence that the model was trained for; None if unknown.
        bos_token_id, eos_token_id, pad_token_id: control tokens, where there are any.

    Raises:
        ValueError: a group is missing.
    """

    model_type = MODEL_TYPE

    transformer: dict[str, Any] | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # transformers constructs the class without arguments to know its defaults.
        if self.transformer is None:
            return
        groups = self.transformer if isinstance(self.transformer, dict) else {}
        wrong = [group for group in GROUPS if not isinstance(groups.get(group), dict)]
        if wrong:
            raise ValueError(
                f"config.json: transformer lacks the group {wrong[0]}; write the folder again with: export format=hf."
            )

    @property
    def vocab_size(self) -> int:
        """Vocabulary W; transformers sets it when it resizes the embeddings."""
        return int(self._model["vocab_size"])

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self._model["vocab_size"] = int(value)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the unembedding is the embedding's matrix, which is registered and saved once."""
        return bool(self._model["tied"])

    @property
    def hidden_size(self) -> int:
        """Model dimension D."""
        return int(self._model["dim"])

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return int(self._model["n_layers"])

    @property
    def num_attention_heads(self) -> int:
        """Query heads H."""
        return int(self._model["n_heads"])

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads; divides the query heads."""
        return int(self._model["n_kv_heads"])

    @property
    def head_dim(self) -> int:
        """Values per head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def _model(self) -> dict[str, Any]:
        if self.transformer is None:
            raise AttributeError("transformer")
        model: dict[str, Any] = self.transformer["model"]
        return model
