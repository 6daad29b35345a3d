"""What a run directory holds besides weights and records, so that it can be used anywhere: tokenizer, held-out data."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

import lightning as L

from pkm_lightning.checkpoints.companions import CHAT_TEMPLATE, TOKENIZER, companion_place
from pkm_lightning.data.base import chat_template_of, tokenizer_of
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.held_out import HELD_OUT, copy_files, holds_held_out, is_held_out_of, keep_held_out
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import write_beside

__all__ = ["HELD_OUT", "copy_held_out", "keep_with_run"]
_log = logging.getLogger(__name__)


def copy_held_out(weights: Path, fingerprint: str | None, folder: Path) -> bool:
    """Copies the held-out data of the run that `weights` lie in into `folder`, unless it holds others.

    Returns whether `folder` holds those of the run now.

    Raises:
        RunDirectoryError: the disk is full or the folder cannot be written.
    """
    source, target, part = companion_place(weights, HELD_OUT), folder / HELD_OUT, folder / f"{HELD_OUT}.part"
    if not is_held_out_of(source, fingerprint):
        return False
    if is_held_out_of(target, fingerprint):
        return True
    if target.exists():
        _log.info("%s is of other data: validate and test of this model need theirs, or a folder of its own", target)
        return False
    try:
        shutil.rmtree(part, ignore_errors=True)
        copy_files(source, part)
        os.replace(part, target)
        return True
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunDirectoryError(
            f"{target} cannot be written ({error.strerror}: {error.filename or target}); free the disk or restore it."
        ) from None


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
    if (template := chat_template_of(tokenizer)) is not None:
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
