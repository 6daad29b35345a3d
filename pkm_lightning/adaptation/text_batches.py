"""Where other text comes from: the data of a run, or a text file of the user's.

It is split in two. The learning of an edit is penalised for what it changes in one part; the other, which no penalty
sees, decides whether the change stays within its bound.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from pkm_lightning.adaptation.fact_sequences import fact_sequences, padded_batches
from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.data.base import NO_TARGET, Batch, RecallItem
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.files import find_files, read_text
from pkm_lightning.data.held_out import HeldOutDataModule
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import DataError, counted

_log = logging.getLogger(__name__)
#: Tokens per batch, padding included.
_BATCH_TOKENS = 1024
#: Tokens per sequence of a text file, at most.
_SEQUENCE = 256
#: Tokens to predict below which a bound is measured on little.
_FEW = 2000


class TextParts(NamedTuple):
    """Batches of other text: those that the learning sees, and those that bound what it may change."""

    penalised: list[Batch]
    held_out: list[Batch]


def check_bounding(text: TextParts) -> None:
    """Refuses text that leaves nothing to measure a bound on, and warns where that is little.

    Raises:
        DataError: the held-out part has no token to predict.
    """
    count = sum(int((batch["labels"] != NO_TARGET).sum()) for batch in text.held_out)
    if not count:
        raise DataError(
            "the other text has no token to measure kl_bound on: what the edit changes besides the facts would be "
            "unknown; give drift_path=FILE of other text (in a program: TextParts.held_out)."
        )
    if count < _FEW:
        _log.warning(
            "kl_bound is measured on %s of other text, fewer than %s: how much else changes is uncertain; give more "
            "with drift_path=FILE or a higher drift_tokens",
            *(counted(count, "token"), f"{_FEW:,}"),
        )


def held_out_parts(folder: Path, tokenizer_file: Path, *, most_tokens: int, seed: int) -> TextParts:
    """Returns what a run has kept for its evaluation: sequences, and questions with their answers.

    The learning sees the validation part and its questions, the bound is that of the test part and its questions; where
    both are the same, each gets one half.

    Args:
        folder: `RUN/heldout`.
        tokenizer_file: that of the run.
        most_tokens: of each part, padding included.
        seed: of the choice where there is more text.

    Raises:
        DataError: the folder is damaged.
    """
    data = HeldOutDataModule(
        folder=str(folder),
        tokenizer=str(tokenizer_file),
        # What remains decides nothing here: no loader is made, and the vocabulary is that of the file.
        vocab_size=0,
        seq_len=2,
        global_batch_size=1,
        num_workers=0,
        order_seed=0,
        cache_dir=str(folder),
        prompts=(),
        prompts_file=None,
    )
    data.prepare_data()
    splits, draw = data.splits, random.Random(seed)
    sequences = [splits.validation.__getitems__([key]) for key in range(len(splits.validation_keys))]
    questions, items = list(data.validation_items()), list(data.recall_items())
    draw.shuffle(sequences)
    draw.shuffle(questions)
    if splits.test is not None:
        tests = [splits.test.__getitems__([key]) for key in range(len(splits.test_keys))]
        draw.shuffle(tests)
    else:
        sequences, tests = sequences[::2], sequences[1::2]
    if items != data.validation_items():
        draw.shuffle(items)
    else:
        questions, items = questions[::2], questions[1::2]
    parts = ((sequences, questions), (tests, items))
    return TextParts(*(_mixed(texts, queries, data.tokenizer, most_tokens) for texts, queries in parts))


def training_batches(data: TokenDataModule, most_tokens: int) -> list[Batch]:
    """Returns the first sequences of a run's prepared training data, in their order of training."""
    splits, batches = data.splits, list[Batch]()
    keys = splits.order.keys(0)
    read = 0
    for start in range(0, len(keys), 16):
        batch = splits.train.__getitems__([keys[place] for place in range(start, min(start + 16, len(keys)))])
        if batches and read + batch["input_ids"].numel() > most_tokens:
            break
        batches.append(batch)
        read += batch["input_ids"].numel()
    return batches


def _mixed(sequences: Sequence[Batch], questions: Sequence[RecallItem], tokenizer: Tokenizer, most: int) -> list[Batch]:
    """Returns batches of at most `most` tokens, half of them of questions where there are enough of both."""
    facts = [Fact(item.prompt, item.answer) for item in questions]
    queries = padded_batches(fact_sequences(facts, tokenizer, lambda fact: fact.learned, ends=True), _BATCH_TOKENS)
    texts = _joined(sequences)
    random.Random(0).shuffle(queries)
    short = min(most // 2, _tokens(texts)), min(most // 2, _tokens(queries))
    return [*_first(texts, most - short[1]), *_first(queries, most - short[0])]


def _first(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Returns the first batches up to `most` tokens, at least one where there is any."""
    chosen: list[Batch] = []
    for batch in batches:
        if chosen and _tokens(chosen) + batch["input_ids"].numel() > most:
            break
        chosen.append(batch)
    return chosen


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _joined(sequences: Sequence[Batch]) -> list[Batch]:
    """Returns batches of sequences of one width each, which need no padding."""
    by_width: dict[int, list[Batch]] = {}
    for sequence in sequences:
        by_width.setdefault(sequence["input_ids"].shape[1], []).append(sequence)
    joined = []
    for width, group in by_width.items():
        size = max(1, _BATCH_TOKENS // width)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            joined.append({name: torch.cat([batch[name] for batch in part]) for name in part[0]})
    return joined


def text_file_parts(path: str, tokenizer: Tokenizer, *, context: int | None, most_tokens: int) -> TextParts:
    """Returns the first half of text files as what the learning sees, and the second half for the bound.

    Args:
        path: a file, a directory, a glob.
        tokenizer: of the model.
        context: tokens per sequence in training; None for any number.
        most_tokens: of each part.

    Raises:
        DataError: a file is missing or unreadable, or there are fewer than two sequences.
    """
    ids = list(
        chain.from_iterable(
            tokenizer.encode(read_text(file)) for file in find_files(path, (".txt", ".md"), "drift_path")
        )
    )
    width = _SEQUENCE if context is None else min(_SEQUENCE, context)
    if len(ids) < 2 * (width + 1):
        raise DataError(
            f"drift_path={path} has {counted(len(ids), 'token')}, too few to bound what an edit changes; give at "
            f"least {2 * width + 2}."
        )
    half = len(ids) // 2
    return TextParts(*(_sequences_of(part, width, most_tokens) for part in (ids[:half], ids[half:])))


def _sequences_of(ids: Sequence[int], width: int, most: int) -> list[Batch]:
    count = max(1, min((len(ids) - 1) // width, most // width))
    # Spread over the whole text, not its beginning.
    starts = [(len(ids) - 1 - width) * number // max(1, count - 1) for number in range(count)]
    rows = torch.tensor([ids[start : start + width + 1] for start in starts])
    size = max(1, _BATCH_TOKENS // width)
    return [{"input_ids": part[:, :-1], "labels": part[:, 1:].contiguous()} for part in rows.split(size)]
