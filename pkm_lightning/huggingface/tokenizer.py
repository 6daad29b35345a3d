"""The tokenizer of a run as a `PreTrainedTokenizerFast` of transformers, with the same ids for every text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER
from pkm_lightning.data.tokenizer import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int | None, chat_template: Path | None) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and the chat template if there is one.

    Args:
        tokenizer: of the training.
        folder: an existing one.
        context: tokens per sequence that the model was trained for.
        chat_template: a Jinja file.
    """
    tokenizer.save(folder / TOKENIZER)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "pad_token": tokenizer.token(tokenizer.pad_id),
        # Prompts of unequal lengths end where their answers begin.
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # A literal "<eos>" in a text is text, as in training; a chat template writes its control tokens into the text.
        "split_special_tokens": chat_template is None,
    }
    if context is not None:
        settings["model_max_length"] = context
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        shutil.copyfile(chat_template, folder / CHAT_TEMPLATE)
