"""The DataModule that all data sets share: exact order, exact resume, equal batches for any number of ranks.

A data set says what determines it, how its cache folder is built, and which rows the folder holds. Where training
stands is one number, the samples consumed by all ranks together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pkm_lightning.data.batch import Batch, RowSource, as_is
from pkm_lightning.data.cache import CacheKey, Source, open_cache, read_manifest
from pkm_lightning.data.order import EpochOrder, ShareBatchSampler, StepBatchSampler, micro_batch_size
from pkm_lightning.data.prompts import PromptBatches, collect_prompts
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, DataError, check_range

log = logging.getLogger(__name__)


class LoaderOptions(TypedDict):
    """The keys that every data set has.

    Attributes:
        seq_len: tokens a row, T.
        global_batch_size: rows per optimizer step, over all ranks and micro-batches.
        num_workers: loader processes per rank; 0 loads in the training process.
        order_seed: decides the order of the training rows, not which rows there are.
        cache_dir: where built data are kept.
        prompts: texts for `predict`.
        prompts_file: a file of further prompts, or None.
    """

    seq_len: int
    global_batch_size: int
    num_workers: int
    order_seed: int
    cache_dir: str
    prompts: Sequence[str]
    prompts_file: str | None


@dataclass(frozen=True)
class Splits:
    """The rows of a prepared data set.

    Attributes:
        tokenizer: what the ids mean.
        train: training rows, and `order` the epochs over them.
        validation: validation rows, and `validation_keys` all of them in a fixed order.
    """

    tokenizer: Tokenizer
    train: RowSource
    order: EpochOrder
    validation: RowSource
    validation_keys: Sequence[Any]


class TokenDataModule(LightningDataModule):
    """Base of the data sets; a subclass gives `vocab_size`, `cache_key`, `build` and `load`.

    Args:
        loader: see `LoaderOptions`.

    Raises:
        ConfigError: for a value out of range.
    """

    #: Every rank can always make another training batch.
    endless = True

    def __init__(self, **loader: Any) -> None:
        super().__init__()
        unknown = sorted(set(loader) ^ LoaderOptions.__required_keys__)
        if unknown:
            raise ConfigError(
                f"data has missing or unknown keys: {', '.join(unknown)}; the loader keys are "
                f"{', '.join(sorted(LoaderOptions.__required_keys__))}."
            )
        for key, low in {"seq_len": 2, "global_batch_size": 1, "num_workers": 0, "order_seed": 0}.items():
            check_range(f"data.{key}", loader[key], low=low)
        self.seq_len: int = loader["seq_len"]
        self.global_batch_size: int = loader["global_batch_size"]
        self.num_workers: int = loader["num_workers"]
        self.order_seed: int = loader["order_seed"]
        self.cache_dir = Path(os.path.expandvars(loader["cache_dir"])).expanduser()
        if isinstance(loader["prompts"], str):
            raise ConfigError(f"data.prompts={loader['prompts']} is one text; give a list: data.prompts=[...].")
        self._prompts: Sequence[str] = loader["prompts"]
        self._prompts_file: str | None = loader["prompts_file"]
        self._folder: Path | None = None
        self._splits: Splits | None = None
        self._loaded_samples = 0
        # The batch counter at which `_loaded_samples` was right; None until the trainer has restored its counters.
        self._loaded_batches: int | None = 0

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids a model must provide for; known before anything is built, every id is below it."""

    @abstractmethod
    def cache_key(self) -> CacheKey:
        """What determines the cache folder."""

    @abstractmethod
    def build(self, folder: Path) -> list[Source]:
        """Fill the empty `folder` and return where the data came from."""

    @abstractmethod
    def load(self, folder: Path) -> Splits:
        """The rows of a complete `folder`."""

    def view(self) -> dict[str, Any]:
        """Arguments that change the rows but not the cache folder; part of the fingerprint."""
        return {"seq_len": self.seq_len}

    def cache_folder(self) -> Path:
        """The complete cache folder, built now if need be."""
        # Remembered, so that a source file edited during a run does not change the data under it.
        if self._folder is None:
            self._folder = open_cache(self.cache_dir, self.cache_key(), self.build)
        return self._folder

    @property
    def fingerprint(self) -> str:
        """sha256 of the source files, the produced files and the arguments, but not of the order; builds if need be."""
        manifest = read_manifest(self.cache_folder())
        content = {"sources": manifest["sources"], "files": manifest["files"], "view": self.view()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, after `prepare_data` or `setup`."""
        return self.splits.tokenizer

    @property
    def splits(self) -> Splits:
        """The rows, after `prepare_data` or `setup`."""
        if self._splits is None:
            raise ConfigError("The data are not prepared; call prepare_data() or setup() of the DataModule first.")
        return self._splits

    def prepare_data(self) -> None:
        """Build the cache folder if it is missing; several processes may do so at once."""
        self._splits = self.load(self.cache_folder())

    def setup(self, stage: str | None = None) -> None:
        """Open the cache folder, and refuse a global batch that does not divide over the ranks."""
        if self._splits is None:
            self._splits = self.load(self.cache_folder())
        self._micro_batch_size()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless micro-batches of this rank, from the position where training stands."""
        if self._loaded_batches is None:
            self._loaded_batches = self._trained_batches()
        rank, world_size = self._rank_and_world_size()
        sampler = StepBatchSampler(
            self.splits.order,
            lambda: self.position,
            rank=rank,
            world_size=world_size,
            micro_batch=self._micro_batch_size(),
        )
        return self._loader(self.splits.train, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """One pass over the validation rows, shared out over the ranks."""
        rank, world_size = self._rank_and_world_size()
        sampler = ShareBatchSampler(
            self.splits.validation_keys, rank=rank, world_size=world_size, batch_size=self._micro_batch_size()
        )
        return self._loader(self.splits.validation, sampler)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> PromptBatches:
        """The prompts of this rank; index -1 marks a filler.

        Raises:
            ConfigError: if there are no prompts.
            DataError: if the prompts file is missing, empty or malformed.
        """
        rank, world_size = self._rank_and_world_size()
        prompts = collect_prompts(self._prompts, self._prompts_file)
        return PromptBatches(prompts, rank=rank, world_size=world_size, batch_size=self._micro_batch_size())

    @property
    def position(self) -> int:
        """Samples consumed by all ranks since the start of training; loader prefetching does not count."""
        if self._loaded_batches is None:
            return self._loaded_samples
        batches = self._trained_batches() - self._loaded_batches
        if batches < 0:  # a new trainer that starts from nothing
            return self._trained_batches() * self._batch_stride()
        return self._loaded_samples + batches * self._batch_stride()

    def state_dict(self) -> dict[str, Any]:
        """The position in samples, and what it is a position in."""
        return {"samples": self.position, "order_seed": self.order_seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position, also with other ranks and micro-batches than before."""
        if state_dict.get("fingerprint") != self.fingerprint:
            raise DataError(
                "The data are not those that the checkpoint was trained on: a source or a data.* key has changed "
                "since; restore it, or start afresh in another run_dir."
            )
        if state_dict.get("order_seed") != self.order_seed:
            log.warning("The data differ from the checkpoint in order_seed; the resumed order is not exact.")
        self._loaded_samples = int(state_dict["samples"])
        self._loaded_batches = None

    def _loader(self, source: RowSource, sampler: StepBatchSampler | ShareBatchSampler) -> DataLoader[Batch]:
        return DataLoader(
            source,  # type: ignore[arg-type]  # a DataLoader that finds __getitems__ needs no other method
            batch_sampler=sampler,
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        # Ranks of one tensor-parallel group read the same data; the strategy knows how many groups there are.
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return ranks["rank"], ranks["num_replicas"]

    def _micro_batch_size(self) -> int:
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return micro_batch_size(self.global_batch_size, self._rank_and_world_size()[1], accumulate)

    def _batch_stride(self) -> int:
        return self._micro_batch_size() * self._rank_and_world_size()[1]

    def _trained_batches(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
