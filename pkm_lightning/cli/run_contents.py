"""What a run directory holds besides weights and records, so that it can be used anywhere: tokenizer, held-out data."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import lightning as L

from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER
from pkm_lightning.data.base import tokenizer_of
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.held_out import holds_held_out, keep_held_out
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import write_beside

HELD_OUT = "heldout"
_log = logging.getLogger(__name__)


def keep_with_run(data: L.LightningDataModule, run_dir: Path) -> None:
    """Writes the tokenizer and the held-out data of prepared `data` into `run_dir`, each complete or not at all.

    Raises:
        RunDirectoryError: the disk is full or the directory cannot be written.
    """
    tokenizer = tokenizer_of(data)
    if isinstance(tokenizer, Tokenizer):
        write_beside(run_dir / TOKENIZER, tokenizer.to_json())
    elif tokenizer is not None:
        _log.info("%s cannot be written as tokenizer.json: the run needs its data to be used", type(tokenizer).__name__)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        write_beside(run_dir / CHAT_TEMPLATE, template)
    folder, part = run_dir / HELD_OUT, run_dir / f"{HELD_OUT}.part"
    if isinstance(data, TokenDataModule) and not holds_held_out(folder):
        try:
            for entry in (folder, part):
                shutil.rmtree(entry, ignore_errors=True)
            keep_held_out(data, part)
            with contextlib.suppress(FileNotFoundError):  # too large to be kept
                os.replace(part, folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise RunDirectoryError(
                f"{folder} cannot be written ({error.strerror}); free the disk, or choose another run_dir."
            ) from None
