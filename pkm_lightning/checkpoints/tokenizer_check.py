"""Compares the tokenizer that a checkpoint was trained with to that of the data: ids must mean the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import CheckpointError


def tokenizer_digest(data: object) -> str | None:
    """Returns the digest of the data module's tokenizer, or None where it has no tokenizer or digest."""
    return getattr(getattr(data, "tokenizer", None), "digest", None)


def check_tokenizer(checkpoint: Mapping[str, Any], data: object) -> None:
    """Refuses data whose token ids have another meaning than those that a checkpoint's weights were trained on.

    Raises:
        CheckpointError: the digests differ.
    """
    trained, current = checkpoint.get("tokenizer"), tokenizer_digest(data)
    if trained is not None and current is not None and trained != current:
        raise CheckpointError(
            "the data's tokenizer is not the one that the checkpoint was trained with (a source or a data.* key has "
            "changed since), so ids would mean other words; restore the data, or set data.tokenizer=FILE to the "
            "tokenizer of the training."
        )
