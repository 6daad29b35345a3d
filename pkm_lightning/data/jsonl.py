"""`data=jsonl data.path=...`: one record per line, either a text or a prompt with the answer to be learned."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.corpus import CorpusDataModule
from pkm_lightning.data.datamodule import Splits, TokenOptions
from pkm_lightning.data.files import file_identities
from pkm_lightning.data.packing import PackedOrder, pack
from pkm_lightning.data.readers.records import read_records, text_field
from pkm_lightning.data.statements import StatementSequences, StatementStore, write_statements
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, DataError, check_choice

__all__ = ["JsonlDataModule"]


@dataclass(frozen=True)
class Record:
    """One line: `answer` is learned after `prompt`; a record with a text alone has an empty prompt.

    Attributes:
        where: `file:line`.
    """

    where: str
    prompt: str
    answer: str


class JsonlDataModule(CorpusDataModule):
    """Records as documents, the loss on the answer, or on the whole text where there is no prompt.

    The first record decides which fields all records must have: prompt and answer if it has both, else text. A text
    longer than a sequence is continued in further sequences; a prompt with its answer must fit in one.

    Args:
        path: a file, a directory (*.jsonl at any depth), a glob, or a list of them.
        text_field, prompt_field, answer_field: names of the fields.
        packing: `documents` fills sequences of `seq_len` with whole records, `none` uses one sequence per record.
        val_fraction: share of the records that is held out, chosen by a hash of their number, 0.001 to 0.5.
        seed: of that hash.
        options: see `TokenOptions`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for records that are missing, malformed or too long; names file and line.
    """

    suffixes = (".jsonl",)

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        text_field: str,
        prompt_field: str,
        answer_field: str,
        packing: str,
        val_fraction: float,
        seed: int,
        **options: Unpack[TokenOptions],
    ) -> None:
        super().__init__(path=path, val_fraction=val_fraction, seed=seed, **options)
        check_choice("data.packing", packing, ["documents", "none"])
        self.text_field = text_field
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.packing = packing

    def cache_key(self) -> CacheKey:
        """Returns the state of the files, the fields, how records are split and cut, and the tokenizer."""
        arguments = {
            "files": file_identities(self.files()),
            "fields": [self.text_field, self.prompt_field, self.answer_field],
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            # `build` cuts long texts into pieces of this length.
            "seq_len": self.seq_len,
            "tokenizer": self.tokenizer_choice.identity(),
        }
        return CacheKey("jsonl", arguments)

    def view(self) -> dict[str, Any]:
        """Returns sequence length and packing."""
        return {"seq_len": self.seq_len, "packing": self.packing}

    def build(self, folder: Path) -> list[Source]:
        """Reads and splits the records, trains the tokenizer on the training part, and tokenises both parts."""
        records = self._records()
        is_validation = validation_split(len(records), self.val_fraction, self.seed)
        train = [record for record, held_out in zip(records, is_validation, strict=True) if not held_out]
        validation = [record for record, held_out in zip(records, is_validation, strict=True) if held_out]
        if not train:
            raise DataError(f"data.path={self.path} has {len(records)} record; training and validation need one each.")
        self.log_split(len(records), "record", f"{len(validation)} are")
        tokenizer = self.tokenizer_choice.make(lambda: (f"{r.prompt} {r.answer}".strip() for r in train))
        tokenizer.save(folder / "tokenizer.json")
        statements = [list(self._statements(part, tokenizer)) for part in (train, validation)]
        both = [*statements[0], *statements[1]]
        write_statements(folder, (s[0] for s in both), (s[1] for s in both), tokenizer.vocab_size)
        np.save(folder / "train.npy", np.arange(len(statements[0])))
        np.save(folder / "validation.npy", np.arange(len(statements[0]), len(both)))
        # As text: recall compares text, and longer records have been cut.
        questions = [[record.prompt, record.answer] for record in validation if record.prompt]
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        return self.sources()

    def load(self, folder: Path) -> Splits:
        """Opens the records."""
        store = StatementStore(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        capacity = self.seq_len if self.packing == "documents" else None
        sequences = StatementSequences(store, width=capacity, answer_only=True, pad_id=tokenizer.pad_id)
        train, validation = np.load(folder / "train.npy"), np.load(folder / "validation.npy")
        return Splits(
            tokenizer=tokenizer,
            train=sequences,
            order=PackedOrder(train, store.lengths, capacity=capacity, seed=self.order_seed),
            validation=sequences,
            validation_keys=pack(validation, store.lengths, capacity),
            tokens=(int(store.lengths[train].sum()), int(store.lengths[validation].sum())),
        )

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` validation prompts with answers, without options; plain text has none."""
        questions = json.loads((self.cache_folder() / "questions.json").read_text(encoding="utf-8"))
        return [
            RecallItem(prompt, answer, (), "record", "validation", 0, 0, math.nan, False)
            for prompt, answer in questions[:limit]
        ]

    def _records(self) -> list[Record]:
        raw = [(f"{file}:{line}", record) for file in self.files() for line, record in read_records(file)]
        if not raw:
            raise DataError(f"data.path={self.path} is empty; write one JSON object per line.")
        if self.prompt_field in raw[0][1] and self.answer_field in raw[0][1]:
            fields = (self.prompt_field, self.answer_field)
            return [Record(where, *(text_field(where, record, field) for field in fields)) for where, record in raw]
        return [Record(where, "", text_field(where, record, self.text_field)) for where, record in raw]

    def _statements(self, records: list[Record], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
        """Yields the tokens of every record, and the index at which its answer begins."""
        prompts = tokenizer.encode_batch([record.prompt for record in records])
        answers = tokenizer.encode_batch([f" {r.answer}" if r.prompt else r.answer for r in records])
        for record, prompt, answer in zip(records, prompts, answers, strict=True):
            tokens = [*prompt, *answer, tokenizer.eos_id]
            if prompt and len(tokens) - 1 > self.seq_len:
                raise ConfigError(
                    f"{record.where}: prompt and answer need {len(tokens) - 1} tokens, data.seq_len={self.seq_len} is "
                    f"too short; set data.seq_len={len(tokens) - 1} or more, or shorten the record."
                )
            # Pieces share one token: the last of a piece is a label, and the first input of the next.
            # A text without a prompt has its first target after its first token, which nothing precedes.
            for begin in range(0, len(tokens) - 1, self.seq_len):
                yield tokens[begin : begin + self.seq_len + 1], max(1, len(prompt))


def validation_split(n: int, fraction: float, seed: int) -> list[bool]:
    """Returns whether each of `n` records is held out.

    A hash of its number decides, so that records appended later change no other's part. The record with the lowest
    hash is always held out, so that validation is never empty.
    """
    hashes = [int(hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:15], 16) / 16**15 for i in range(n)]
    bound = max(fraction, min(hashes))
    return [value < fraction or value == bound for value in hashes]
