"""Compares the tokenizer that a checkpoint was trained with to that of the data: ids must mean the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import CheckpointError


def check_tokenizer(checkpoint: Mapping[str, Any], digest: str | None) -> None:
    """Refuses data whose token ids have another meaning than those that a checkpoint's weights were trained on.

    Raises:
        CheckpointError: the digests differ.
    """
    trained = checkpoint.get("tokenizer")
    if trained is not None and digest is not None and trained != digest:
        raise CheckpointError(
            "the data's tokenizer is not the one that the checkpoint was trained with (a source or a data.* key has "
            "changed since), so ids would mean other words; restore the data, or tokenise them with the "
            "tokenizer of the training, data.tokenizer=FILE (for data=tokens and data=mix a key of prepare)."
        )
