"""The tokenizer of a run as a `PreTrainedTokenizerFast` of transformers, with the same ids for every text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def tokenizer_file(checkpoint: Path) -> Path | None:
    """Returns the tokenizer.json of the run that a checkpoint belongs to, or the one beside an exported file."""
    run_dir = run_directory(checkpoint)
    folder = checkpoint.parent if run_dir is None else run_dir
    return folder / TOKENIZER if (folder / TOKENIZER).is_file() else None


def run_directory(checkpoint: Path) -> Path | None:
    """Returns the directory of the run that a checkpoint lies in, or None."""
    run_dir = checkpoint.absolute().parent.parent
    return (
        run_dir if checkpoint.absolute().parent.name == "checkpoints" and (run_dir / "config.yaml").is_file() else None
    )


def load_tokenizer(file: Path, digest: str | None) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json, without what would add control tokens: training added none.

    Args:
        file: the tokenizer.json.
        digest: of the training's tokenizer, as the checkpoint holds it.

    Raises:
        CheckpointError: the digests differ, so that ids would have another meaning.
        DataError: the file cannot be read, or has no end token.
    """
    tokenizer = Tokenizer.load(file)
    if digest is not None and tokenizer.digest != digest:
        raise CheckpointError(
            f"{file} is not the tokenizer that the checkpoint was trained with, so ids would mean other words; restore "
            "the training's, or remove the file to export without one."
        )
    return tokenizer.without_additions()


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
