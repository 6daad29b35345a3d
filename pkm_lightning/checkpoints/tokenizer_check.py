"""Token ids mean words: a checkpoint and the data that it is used with must agree on which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkm_lightning.errors import CheckpointError


def check_tokenizer(checkpoint: Mapping[str, Any], digest: str | None) -> None:
    """Refuse data whose token ids mean other words than those that a checkpoint's weights were trained on.

    Raises:
        CheckpointError: the digests differ.
    """
    trained = checkpoint.get("tokenizer")
    if trained is not None and digest is not None and trained != digest:
        raise CheckpointError(
            "the data's tokenizer is not the one that the checkpoint was trained with (a source or a data.* key has "
            "changed since), so ids would mean other words; restore the data, or give its tokenizer as "
            "data.tokenizer=FILE."
        )
