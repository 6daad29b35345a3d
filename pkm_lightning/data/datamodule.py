"""The data module that tokenised data sources share: exact order, exact resume, equal batches for any number of ranks.

A subclass defines what determines its cache folder, how the folder is built, and which sequences it holds. The state of
training is one number: the sequences that all ranks together have consumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from pkm_lightning.data.base import Batch, fingerprint_of
from pkm_lightning.data.batch import SequenceSource, as_is
from pkm_lightning.data.cache import CacheKey, Source, open_cache, read_manifest
from pkm_lightning.data.files import expanded
from pkm_lightning.data.order import ShareBatchSampler, StepBatchSampler, micro_batch_size
from pkm_lightning.data.prompts import PromptBatches, check_prompts, collect_prompts
from pkm_lightning.data.replay import Replay
from pkm_lightning.data.splits import Splits
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import ConfigError, DataError, check_range

__all__ = ["LoaderOptions", "Splits", "TokenDataModule", "TokenOptions"]

#: Longer sequences fit in no memory: one of them has a quarter of a gigabyte of ids, labels and documents.
MAX_SEQ_LEN = 2**24

#: Epochs beyond which a run remarks how often it reads its data.
MANY_PASSES = 20

log = logging.getLogger(__name__)


def remark_vocabulary(configured: int, learned: int) -> str | None:
    """Returns a remark if a vocabulary was learned from too little text to be as large as was asked; None if not."""
    if learned >= configured:
        return None
    return (
        f"data.vocab_size={configured}, but the text gave {learned} tokens: further rows of a model have no words; "
        f"set data.vocab_size={learned}"
    )


class LoaderOptions(TypedDict):
    """The configuration keys that every tokenised data source has.

    Attributes:
        seq_len: tokens per sequence, T.
        global_batch_size: sequences per optimizer step, over all ranks and micro-batches.
        num_workers: loader processes per rank; 0 loads in the training process.
        order_seed: decides the order of the training sequences, not which sequences there are.
        cache_dir: where prepared data are kept.
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


class TokenizerOptions(TypedDict, total=False):
    """The configuration keys of a tokenizer that may be absent; `TokenizerChoice` explains them.

    Attributes:
        special_tokens: names of further control tokens.
        normalization: what is done to texts before they are encoded, or None.
        tokenizer_bytes: of text that a `bpe` vocabulary is learned from at most.
        tokenizer_pattern: cuts texts for a .tiktoken file, or None.
    """

    special_tokens: Sequence[str]
    normalization: str | None
    tokenizer_bytes: int
    tokenizer_pattern: str | None


class TokenOptions(LoaderOptions, TokenizerOptions):
    """The configuration keys of a data source that turns text into tokens.

    Attributes:
        tokenizer: `bpe`, `bytes`, or a path; see `TokenizerChoice`.
        vocab_size: tokens of a `bpe` vocabulary, 258 or more.
    """

    tokenizer: str
    vocab_size: int


class TokenDataModule(LightningDataModule):
    """Base of tokenised data sources; a subclass defines `cache_key`, `build` and `load`.

    Args:
        options: see `TokenOptions`.

    Raises:
        ConfigError: for a missing or unknown key, or a value out of range.

    Example: `tests/contributions/data/modular_arithmetic.py`.
    """

    #: Every rank can always make another training batch.
    endless = True
    #: Whether `build` continues in a folder that a killed call of it has left.
    resumes_build = False
    #: Whether there is something to build; sources that read prepared data have nothing.
    builds = True

    def __init__(self, **options: Unpack[TokenOptions]) -> None:
        super().__init__()
        wrong = sorted((set(options) ^ TokenOptions.__required_keys__) - TokenOptions.__optional_keys__)
        if wrong:
            raise ConfigError(
                f"data has missing or unknown keys: {', '.join(wrong)}; besides its own, every token data source has "
                f"the keys {', '.join(sorted(TokenOptions.__required_keys__))}."
            )
        self.seq_len = options["seq_len"]
        self.global_batch_size = options["global_batch_size"]
        self.num_workers = options["num_workers"]
        self.order_seed = options["order_seed"]
        check_range("data.seq_len", self.seq_len, low=2, high=MAX_SEQ_LEN)
        check_range("data.global_batch_size", self.global_batch_size, low=1, high=2**31 - 1)
        check_range("data.num_workers", self.num_workers, low=0, high=1024)
        check_range("data.order_seed", self.order_seed, low=0)
        cache_dir = options["cache_dir"]
        if not isinstance(cache_dir, str) or not cache_dir.strip():
            shown = "null" if cache_dir is None else cache_dir
            raise ConfigError(f"data.cache_dir={shown} names no directory; set one, or leave the key out.")
        self.cache_dir = expanded(cache_dir)
        check_prompts(options["prompts"])
        self._prompts = options["prompts"]
        self._prompts_file = options["prompts_file"]
        self.tokenizer_choice = TokenizerChoice.of(options, self.cache_dir)
        self._folder: Path | None = None
        self._splits: Splits | None = None
        #: Old data among the training sequences; see `pkm_lightning.data.replay`.
        self.replay: Replay | None = None
        self._loaded_samples = 0
        # The batch counter at which `_loaded_samples` was right; None until the trainer has restored its counters.
        self._loaded_batches: int | None = 0

    def cache_key(self) -> CacheKey:
        """Returns what determines the content of the cache folder; not defined by a source that builds none."""
        raise NotImplementedError

    def build(self, folder: Path) -> list[Source]:
        """Fills the empty `folder` and returns where the data came from; likewise."""
        raise NotImplementedError

    def prepared_sources(self) -> list[dict[str, Any]]:
        """Returns the names, versions and licences of what the prepared data were made from; builds nothing.

        Raises:
            OSError, ValueError, KeyError: nothing complete is prepared.
        """
        sources: list[dict[str, Any]] = read_manifest(self.cache_dir / self.cache_key().folder_name())["sources"]
        return sources

    @abstractmethod
    def load(self, folder: Path) -> Splits:
        """Returns the sequences of a complete `folder`."""

    def view(self) -> dict[str, Any]:
        """Returns the arguments that change the sequences but not the cache folder; part of the fingerprint."""
        return {"seq_len": self.seq_len}

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model must provide for; known before anything is built, every id is below it."""
        return self.tokenizer_choice.vocab_size()

    def cache_folder(self) -> Path:
        """Returns the complete cache folder, which is built if it is missing."""
        # Remembered, so that a source file edited during a run does not change the data under it.
        if self._folder is None:
            self._folder = open_cache(self.usable_cache_dir(), self.cache_key(), self.build, resumes=self.resumes_build)
        return self._folder

    def usable_cache_dir(self) -> Path:
        """Returns `cache_dir`.

        Raises:
            ConfigError: it lies in the home directory of a user who has none.
        """
        if self.cache_dir.parts[:1] == ("~",):
            raise ConfigError(
                f"data.cache_dir={self.cache_dir}: this user has no home directory; set data.cache_dir or the "
                "environment variable PKM_LIGHTNING_CACHE to a directory."
            )
        return self.cache_dir

    @property
    def fingerprint(self) -> str:
        """sha256 of source files, produced files and arguments, but not of the order; builds what is missing."""
        manifest = read_manifest(self.cache_folder())
        content = {"sources": manifest["sources"], "files": manifest["files"], "view": self.view()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, after `prepare_data` or `setup`."""
        return self.splits.tokenizer

    @property
    def own_test(self) -> bool:
        """Whether the test reads other sequences than validations, after `prepare_data` or `setup`."""
        return self.splits.test is not None

    @property
    def splits(self) -> Splits:
        """The sequences, after `prepare_data` or `setup`."""
        if self._splits is None:
            raise ConfigError("The data are not prepared; call prepare_data() or setup() of the DataModule first.")
        return self._splits

    def prepare_data(self) -> None:
        """Builds the cache folder if it is missing; several processes may do so at once."""
        self._splits = self.opened()

    def opened(self) -> Splits:
        """Returns the sequences, among those of training the replayed ones; builds what is missing."""
        splits = self.load(self.cache_folder())
        return splits if self.replay is None else self.replay.mixed_into(splits, self.order_seed)

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache folder, and refuses a global batch that does not divide over the ranks."""
        # Lightning calls `prepare_data` on one rank per node only.
        if self._splits is None:
            self._splits = self.opened()
        # For its refusal, before a loader or a worker exists.
        self._micro_batch_size()
        if stage == "fit":
            self._log_remarks()

    def content(self) -> list[str]:
        """Returns lines about what the data are, which are logged before training."""
        return []

    @rank_zero_only
    def _log_remarks(self) -> None:
        if remark := remark_vocabulary(self.vocab_size, self.tokenizer.vocab_size):
            log.warning(remark)
        steps = 0 if self.trainer is None else self.trainer.max_steps
        if steps > 0 and (times := self.passes(steps)) > MANY_PASSES:
            log.info(
                "%s steps read the training data %s times; trainer.max_steps sets how many",
                f"{steps:,}",
                f"{times:,.0f}",
            )
        for line in [*self.content(), *([] if self.replay is None else self.replay.content())]:
            log.info(line)

    def passes(self, steps: int) -> float:
        """Returns how often so many optimizer steps read the training data, after `prepare_data` or `setup`."""
        order, share = self.splits.order, 1.0
        if self.replay is not None:
            order, share = self.replay.new_order, 1 - self.replay.share
        # The first section stands for all: they differ by little.
        return steps * self.global_batch_size * share / (order.sections * order.size(0))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns endless micro-batches of this rank, from the position where training stands."""
        # Lightning restores the loops' counters after `load_state_dict` and before it asks for this loader.
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
        """Returns one pass over the validation sequences, shared out over the ranks."""
        return self._one_pass(self.splits.validation, self.splits.validation_keys)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns one pass over the test sequences, or over those of validation where there are no others."""
        if self.splits.test is None:
            rank_zero_only(log.info)("the data have no test part: the validation part is tested")
            return self.val_dataloader()
        return self._one_pass(self.splits.test, self.splits.test_keys)

    def predict_dataloader(self) -> PromptBatches:
        """Returns the prompts of this rank; index -1 marks a filler.

        Raises:
            ConfigError: if there are no prompts.
            DataError: if the prompts file is missing, empty or malformed.
        """
        rank, world_size = self._rank_and_world_size()
        prompts = collect_prompts(self._prompts, self._prompts_file)
        return PromptBatches(prompts, rank=rank, world_size=world_size, batch_size=self._micro_batch_size())

    @property
    def position(self) -> int:
        """Sequences consumed by all ranks since the start of training; loader prefetching does not count."""
        if self._loaded_batches is None:
            return self._loaded_samples
        batches = self._trained_batches() - self._loaded_batches
        # A new trainer counts from 0: this data module has been used before, and training starts from nothing.
        if batches < 0:
            return self._trained_batches() * self._batch_stride()
        return self._loaded_samples + batches * self._batch_stride()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in sequences, and the order and data that it is a position in."""
        return {"samples": self.position, "order_seed": self.order_seed, "fingerprint": fingerprint_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at a saved position, also with other ranks and micro-batches than before.

        Raises:
            DataError: the position is one in other data.
        """
        if state_dict.get("fingerprint") != fingerprint_of(self):
            raise DataError(
                "The data are not those that the checkpoint was trained on: a source, a data.* key or the version of "
                "the package has changed since; restore it, or start a new run from the weights with init_from=RUN_DIR."
            )
        if state_dict.get("order_seed") != self.order_seed:
            log.warning("The data differ from the checkpoint in order_seed; the resumed order is not exact.")
        self._loaded_samples = int(state_dict["samples"])
        self._loaded_batches = None

    def _one_pass(self, source: SequenceSource, keys: Sequence[Any]) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        batch_size = self._micro_batch_size()
        return self._loader(source, ShareBatchSampler(keys, rank=rank, world_size=world_size, batch_size=batch_size))

    def _loader(self, source: SequenceSource, sampler: StepBatchSampler | ShareBatchSampler) -> DataLoader[Batch]:
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
        # `ready` and not `completed`: Lightning 2.6 writes checkpoints before it counts their last batch as completed.
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
