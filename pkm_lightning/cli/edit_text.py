"""The text that `edit` compares the model on: that of the command, or what the run has kept."""

from __future__ import annotations

from pathlib import Path

from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.adaptation.text_batches import TextParts, held_out_parts, text_file_parts
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.checkpoints.companions import TOKENIZER, companion_place
from pkm_lightning.cli.run_contents import HELD_OUT
from pkm_lightning.data.held_out import holds_held_out
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError


def other_text(drift_path: str | None, weights: Path, loaded: LoadedModel, settings: WritingSettings) -> TextParts:
    """Returns both parts of the text.

    Raises:
        ConfigError: none is named, and the run has kept none.
        DataError: it cannot be read, or is too short.
    """
    if drift_path is not None:
        codec = loaded.codec()
        assert isinstance(codec, Tokenizer)
        return text_file_parts(drift_path, codec, context=loaded.context, most_tokens=settings.drift_tokens)
    folder = companion_place(weights, HELD_OUT)
    if not holds_held_out(folder):
        raise ConfigError(
            f"{folder} has no held-out data, by which `edit` bounds what else it changes; give drift_path=FILE of other "
            "text."
        )
    tokenizer = companion_place(weights, TOKENIZER)
    return held_out_parts(folder, tokenizer, most_tokens=settings.drift_tokens, seed=settings.seed)
