"""`data=jsonl data.path=...`: one record a line, either a text or a prompt with the answer that is to be learned."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pkm_lightning.data.cache import CacheKey, Source, sha256_file
from pkm_lightning.data.datamodule import Splits, TokenDataModule
from pkm_lightning.data.files import file_identities, find_files, read_records, text_field
from pkm_lightning.data.packing import PackedOrder, pack_rows
from pkm_lightning.data.recall import RecallItem
from pkm_lightning.data.statements import StatementRows, StatementStore, write_statements
from pkm_lightning.data.tokenizer import Tokenizer, TokenizerChoice
from pkm_lightning.errors import ConfigError, DataError, check_choice, check_range

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pkm_lightning.data.datamodule import LoaderOptions


@dataclass(frozen=True)
class Record:
    """One line: `answer` is learned after `prompt`; a record with a text alone has no prompt.

    Attributes:
        where: `file:line`.
    """

    where: str
    prompt: str
    answer: str


class JsonlDataModule(TokenDataModule):
    """Records as documents, the loss on the answer, or on the whole text where there is no prompt.

    The first record decides which fields all records must have: prompt and answer if it has both, else text. A text
    longer than a row is continued in further rows; a prompt with its answer must fit in one.

    Args:
        path: a file, a directory (*.jsonl at any depth), a glob, or a list of them.
        text_field, prompt_field, answer_field: names of the fields.
        packing: `documents` fills rows of `seq_len` with whole records, `none` gives each record a row.
        val_fraction: part of the records that validation gets, chosen by a hash of their number, 0.001 to 0.5.
        seed: of that hash.
        tokenizer: `bpe`, `bytes`, or the path of a `tokenizer.json`.
        vocab_size: of a `bpe` tokenizer, 258 or more.
        loader: see `LoaderOptions`.

    Raises:
        ConfigError: for a value out of range.
        DataError: in `prepare_data`, for records that are missing, malformed or too long; names file and line.
    """

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
        tokenizer: str,
        vocab_size: int,
        **loader: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(**loader)
        check_choice("data.packing", packing, ["documents", "none"])
        check_range("data.val_fraction", val_fraction, low=0.001, high=0.5)
        check_range("data.seed", seed, low=0)
        self.path = path if isinstance(path, str) else tuple(path)
        self.text_field = text_field
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.packing = packing
        self.val_fraction = val_fraction
        self.seed = seed
        self._tokenizer_choice = TokenizerChoice(tokenizer, vocab_size)

    @property
    def vocab_size(self) -> int:
        """The configured vocabulary; every id is below it."""
        return self._tokenizer_choice.vocab_size()

    def cache_key(self) -> CacheKey:
        """The files as they are now, which fields are read, how records are split and cut, and the tokenizer."""
        arguments = {
            "files": file_identities(self._files()),
            "fields": [self.text_field, self.prompt_field, self.answer_field],
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "tokenizer": self._tokenizer_choice.identity(),
        }
        return CacheKey("jsonl", arguments)

    def view(self) -> dict[str, Any]:
        """Row width and packing."""
        return {"seq_len": self.seq_len, "packing": self.packing}

    def build(self, folder: Path) -> list[Source]:
        """Read and split the records, learn the tokenizer from the training part, and tokenise both parts."""
        records = self._records()
        is_validation = validation_split(len(records), self.val_fraction, self.seed)
        train = [record for record, held in zip(records, is_validation, strict=True) if not held]
        validation = [record for record, held in zip(records, is_validation, strict=True) if held]
        if not train:
            raise DataError(f"data.path={self.path} has {len(records)} record; training and validation need one each.")
        tokenizer = self._tokenizer_choice.make(lambda: (f"{r.prompt} {r.answer}".strip() for r in train))
        tokenizer.save(folder / "tokenizer.json")
        statements = [list(self._statements(part, tokenizer)) for part in (train, validation)]
        both = [*statements[0], *statements[1]]
        write_statements(folder, (s[0] for s in both), (s[1] for s in both), tokenizer.vocab_size)
        np.save(folder / "train.npy", np.arange(len(statements[0])))
        np.save(folder / "validation.npy", np.arange(len(statements[0]), len(both)))
        questions = [[record.prompt, record.answer] for record in validation if record.prompt]
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        return [Source(str(self.path), files={str(file): sha256_file(file) for file in self._files()})]

    def load(self, folder: Path) -> Splits:
        """Open the records."""
        store = StatementStore(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        capacity = self.seq_len if self.packing == "documents" else None
        rows = StatementRows(store, width=capacity, answer_only=True, pad_id=tokenizer.pad_id)
        return Splits(
            tokenizer=tokenizer,
            train=rows,
            order=PackedOrder(np.load(folder / "train.npy"), store.lengths, capacity=capacity, seed=self.order_seed),
            validation=rows,
            validation_keys=pack_rows(np.load(folder / "validation.npy"), store.lengths, capacity),
        )

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """The validation prompts and answers, without options; at most `limit`. Records of plain text give none."""
        questions = json.loads((self.cache_folder() / "questions.json").read_text(encoding="utf-8"))
        return [
            RecallItem(prompt, answer, (), "record", "validation", 0, 0, math.nan, False)
            for prompt, answer in questions[:limit]
        ]

    def _files(self) -> list[Path]:
        return find_files(self.path, [".jsonl"])

    def _records(self) -> list[Record]:
        raw = [pair for file in self._files() for pair in read_records(file)]
        if not raw:
            raise DataError(f"data.path={self.path} is empty; write a JSON object a line.")
        if self.prompt_field in raw[0][1] and self.answer_field in raw[0][1]:
            fields = (self.prompt_field, self.answer_field)
            return [Record(where, *(text_field(where, record, field) for field in fields)) for where, record in raw]
        return [Record(where, "", text_field(where, record, self.text_field)) for where, record in raw]

    def _statements(self, records: list[Record], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
        """Tokens, and where the answer begins, of every record."""
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
            for begin in range(0, len(tokens) - 1, self.seq_len):
                yield tokens[begin : begin + self.seq_len + 1], max(1, len(prompt))


def validation_split(n: int, fraction: float, seed: int) -> list[bool]:
    """Whether each of `n` records is for validation: a hash of its number decides, so that appending moves none.

    The record with the lowest hash is always among them.
    """
    hashes = [int(hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:15], 16) / 16**15 for i in range(n)]
    bound = max(fraction, min(hashes))
    return [value < fraction or value == bound for value in hashes]
