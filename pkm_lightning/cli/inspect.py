"""`inspect`: which slots the tokens of a text read, what that adds, who else reads them, and what is left without."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.checkpoints.companions import companion_place
from pkm_lightning.cli.command_keys import INSPECTION_KEYS
from pkm_lightning.cli.generation import texts_by
from pkm_lightning.cli.job import Job, log_to_stderr, plain
from pkm_lightning.cli.kept_data import with_kept_data
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.cli.paths import expanded
from pkm_lightning.cli.run_contents import HELD_OUT
from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.held_out import HeldOutDataModule, holds_held_out
from pkm_lightning.data.prompts import read_prompts
from pkm_lightning.errors import ConfigError, check_choice, check_integer, counted
from pkm_lightning.inspection import Record, add_ablation, add_slot_readings, trace
from pkm_lightning.inspection.masking import checked_choice
from pkm_lightning.inspection.page import render
from pkm_lightning.inspection.screen import show
from pkm_lightning.inspection.slot_sets import inspected_readers, slot_sets
from pkm_lightning.inspection.text_batches import read_statements, text_batches
from pkm_lightning.inspection.tracing import EFFECTS
from pkm_lightning.storage import check_target, is_stream, write_beside

#: Sequences per forward.
_BATCH = 8
_log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Writes or shows the record of the texts."""
    log_to_stderr()  # the standard output has the record and nothing else
    output, out = _output(job)
    _check_keys(job)
    texts = texts_by(job, read_prompts, key="text", file_key="texts_file")
    if texts is None:
        raise ConfigError("nothing to inspect; give text=TEXT, or texts_file=FILE (- for the standard input).")
    statements = None if job.config.data_path is None else read_statements(_path(job, "data_path"), "data_path")
    choices = _masks(job)
    loaded = load_of_job(job, (*INSPECTION_KEYS, "format"))
    codec, sets = loaded.codec(), slot_sets(inspected_readers(loaded.model))
    masks = [checked_choice(sets, choice, key) for key, choice in choices]
    _log.info("reading %s", counted(len(texts), "text"))
    record = trace(loaded.model, codec, texts, context=loaded.context, effects=job.config.effects, name=_name(loaded))
    kept, most_tokens = _kept_data(loaded), int(job.config.data_tokens)
    questions = [] if kept is None else _some(kept.validation_items(None), int(job.config.questions))
    if statements is not None:
        name, facts = Path(str(job.config.data_path)).name, [one for one in statements if isinstance(one, RecallItem)]
        batches = text_batches(codec, statements, context=loaded.context, batch_size=_BATCH, most_tokens=most_tokens)
        about = _some(facts, int(job.config.questions))
    else:
        name, about = ("validation data" if kept is not None and most_tokens else ""), questions
        batches = iter(()) if kept is None else _kept_batches(kept, most_tokens)
    _log.info("looking for readers of slots in %s", name or "the texts alone")
    add_slot_readings(record, loaded.model, codec, batches, about, most=int(job.config.readers), data=name)
    for choice in masks:
        _log.info("leaving slots out")
        add_ablation(record, loaded.model, codec, choice, context=loaded.context, questions=questions)
    _write(record, output, out, int(job.config.show))


def _output(job: Job) -> tuple[str, Path | None]:
    """Returns `text`, `json` or `html`, which the name of `out` may say, and the file.

    Raises:
        ConfigError: another format, or a page without a file.
    """
    output = job.config.format
    out = None if job.config.out is None else Path(job.config.out)
    if output is None:
        output = "text" if out is None else out.suffix.removeprefix(".")
        if output not in ("text", "json", "html"):
            raise ConfigError(f"out={out} is neither .json nor .html; set format=json or format=html.")
    check_choice("format", output, ("text", "json", "html"))
    if output == "html" and out is None:
        raise ConfigError("format=html writes a page; give out=FILE.html.")
    if output == "text" and out is not None:
        raise ConfigError(f"format=text is for the screen; leave out={out} out, or set format=json or format=html.")
    if out is not None:
        check_target("out", out)
    return str(output), out


def _check_keys(job: Job) -> None:
    for key, low in (("data_tokens", 0), ("questions", 0), ("readers", 1), ("show", 1)):
        check_integer(key, job.config[key], low=low)
    if job.config.effects is not None:
        check_choice("effects", job.config.effects, EFFECTS)


def _path(job: Job, key: str) -> Path:
    value = job.config[key]
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value} is not text; quote it: \"{key}='{value}'\".")
    return Path(expanded(key, value))


def _masks(job: Job) -> list[tuple[str, Any]]:
    """Returns key and choice of what is left out: that of `mask` together, and each set of `mask_table`.

    Raises:
        ConfigError: values that name no slots.
    """
    config = plain(job.config)
    mask, sets = config["mask"], config["mask_table"]
    choices: list[tuple[str, Any]] = []
    if mask is not None:
        ids = [mask] if isinstance(mask, int) and not isinstance(mask, bool) else mask
        lists = list(ids.values()) if isinstance(ids, dict) else [ids]
        if not lists or not all(isinstance(one, list) and one for one in lists):
            raise ConfigError(
                f"mask={mask} names no slots; give mask=[17,42] or mask={{table0:[17,42]}}, and mask_table=table0 for "
                "a whole set."
            )
        choices.append(("mask", ids))
    names = [sets] if isinstance(sets, str) else [] if sets is None else sets
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"mask_table={sets} names no sets of slots; give mask_table=table0, or a list of names.")
    return choices + [("mask_table", {name: None}) for name in dict.fromkeys(names)]


def _name(loaded: LoadedModel) -> str:
    """Returns the path of the weights, and the edits that they were looked at with."""
    edits = [] if loaded.edits is None else list(loaded.edits.applied)
    return f"{loaded.path}{' with the edits ' if edits else ''}{', '.join(edits)}"


def _kept_data(loaded: LoadedModel) -> HeldOutDataModule | None:
    """Returns the held-out data beside the weights, or None."""
    if not holds_held_out(companion_place(loaded.path, HELD_OUT)):
        return None
    data = with_kept_data(loaded.config, loaded.path, None, "inspect", ())["data"]
    if not str(data.get("_target_")).endswith(HeldOutDataModule.__name__):
        return None
    kept: HeldOutDataModule = instantiate(data, "data")
    kept.prepare_data()
    return kept


def _kept_batches(kept: HeldOutDataModule, most_tokens: int) -> Iterator[dict[str, Tensor]]:
    source, keys, tokens = kept.splits.validation, list(kept.splits.validation_keys), 0
    for start in range(0, len(keys), _BATCH):
        if tokens >= most_tokens:
            return
        batch = source.__getitems__(keys[start : start + _BATCH])
        tokens += int((batch["doc_ids"] >= 0).sum())
        yield batch


def _some(items: list[RecallItem], most: int) -> list[RecallItem]:
    """Returns at most `most` items, from all parts of the list: it begins with those of one form."""
    return items[:: max(1, -(-len(items) // max(1, most)))][:most]


def _write(record: Record, output: str, out: Path | None, rows: int) -> None:
    if output == "text":
        # A pipe has no width of its own.
        show(record, Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 160), rows)
    elif out is None:
        print(record.to_json())
    else:
        write_beside(out, record.to_json() + "\n" if output == "json" else render(record))
        if not is_stream(out):
            print(f"written to {out}")
