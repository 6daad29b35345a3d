"""What a run keeps of its data, so that it can be validated and tested anywhere without them.

A folder holds the validation sequences (`sequences.npz`), those of the test part if there are any (`test.npz`), the
questions about the data (`questions.json`), those of validations where they are others (`validation_questions.json`),
and where they come from (`source.json`). It is made from any `TokenDataModule`; `HeldOutDataModule` reads it.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import numpy as np
from torch.utils.data import DataLoader

from pkm_lightning.data.base import (
    NO_TARGET,
    Batch,
    FactSpace,
    RecallItem,
    fact_space_of,
    fingerprint_of,
    recall_items_of,
    validation_items_of,
)
from pkm_lightning.data.batch import SequenceSource, filler, to_batch, token_dtype
from pkm_lightning.data.datamodule import Splits, TokenDataModule, TokenOptions
from pkm_lightning.data.kept_questions import damaged, read_json, read_questions, write_questions
from pkm_lightning.data.order import ShuffledOrder
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import DataError
from pkm_lightning.storage import flush, open_regular, write_beside

__all__ = ["HeldOutDataModule"]

#: The folder in a run directory.
HELD_OUT = "heldout"
#: A run keeps no more validation tokens than these, at about 3 bytes each on disk and 12 in memory.
MOST_TOKENS = 2**24
_ARRAYS = ("inputs", "labels", "documents", "widths")
_SEQUENCES, _TEST, _QUESTIONS, _SOURCE = "sequences.npz", "test.npz", "questions.json", "source.json"
_VALIDATION_QUESTIONS = "validation_questions.json"
#: Inputs, labels and documents of one sequence.
_Columns: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

_log = logging.getLogger(__name__)


def keep_held_out(data: TokenDataModule, folder: Path) -> None:
    """Writes what evaluation needs of prepared `data` into `folder`, which is made; nothing of none or too much.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    splits = data.splits
    parts = {_SEQUENCES: _sequences(splits.validation, splits.validation_keys, splits.tokenizer)}
    if splits.test is not None:
        parts[_TEST] = _sequences(splits.test, splits.test_keys, splits.tokenizer)
    if any(sequences is None for sequences in parts.values()):
        # All or nothing: without the test part, `test` would show figures of the validation part.
        _log.info(
            "validation or test has more than %s tokens, which the run does not keep: both need the data", MOST_TOKENS
        )
        return
    if not parts[_SEQUENCES]:
        return
    folder.mkdir(exist_ok=True)
    for name, sequences in parts.items():
        if sequences:
            _write_sequences(folder / name, sequences)
    items, validation_items = recall_items_of(data, None), validation_items_of(data, None)
    write_questions(folder / _QUESTIONS, items)
    if validation_items != items:
        write_questions(folder / _VALIDATION_QUESTIONS, validation_items)
    # Last: a folder without it is not complete.
    source: dict[str, Any] = {
        "data": type(data).__name__,
        "fingerprint": fingerprint_of(data),
        "test": bool(parts.get(_TEST)),
        "validation_questions": validation_items != items,
    }
    if (space := fact_space_of(data)) is not None:
        source["fact_space"] = asdict(space)
    write_beside(folder / _SOURCE, json.dumps(source, indent=1) + "\n")


def _write_sequences(file: Path, sequences: list[_Columns]) -> None:
    columns = dict(zip(_ARRAYS[:3], map(np.concatenate, zip(*sequences, strict=True)), strict=True))
    columns["widths"] = np.asarray([len(inputs) for inputs, *_ in sequences], dtype=np.int64)
    # The names of the arrays are those of the parameters of savez; mypy takes them for its own.
    np.savez_compressed(file, **columns)  # type: ignore[arg-type]
    flush(file)


def holds_held_out(folder: Path) -> bool:
    """Returns whether `folder` is complete."""
    return (folder / _SOURCE).is_file()


def is_held_out_of(folder: Path, fingerprint: str | None) -> bool:
    """Returns whether `folder` is complete and was made from the data of `fingerprint`; None stands for any."""
    if fingerprint is None or not holds_held_out(folder):
        return holds_held_out(folder)
    try:
        with open_regular(folder / _SOURCE, encoding="utf-8") as file:
            return bool(json.load(file)["fingerprint"] == fingerprint)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True  # damaged, which the data module refuses by name


def held_out_questions(folder: Path) -> list[RecallItem]:
    """Returns the questions of validations in a complete folder: those of the test where there are no others.

    Raises:
        DataError: the folder is damaged.
    """
    separate = folder / _VALIDATION_QUESTIONS
    return read_questions(separate if separate.exists() else folder / _QUESTIONS)


def held_out_batches(folder: Path, pad_id: int, vocab_size: int) -> Iterator[Batch]:
    """Yields the validation sequences of a complete folder, one per batch.

    Args:
        folder: complete.
        pad_id, vocab_size: of the tokenizer of the run.

    Raises:
        DataError: the folder is damaged.
    """
    sequences = HeldOutSequences(folder / _SEQUENCES, pad_id, vocab_size)
    for key in range(len(sequences)):
        yield sequences.__getitems__([key])


def copy_files(source: Path, folder: Path) -> None:
    """Copies a complete folder to `folder`, which is made, and nothing else that may lie in it.

    Raises:
        OSError: a file cannot be read, the disk is full, or the folder cannot be written.
    """
    folder.mkdir()
    optional = [name for name in (_TEST, _VALIDATION_QUESTIONS) if (source / name).exists()]
    for name in (_SEQUENCES, *optional, _QUESTIONS, _SOURCE):
        with open_regular(source / name, "rb") as file, (folder / name).open("wb") as copy:
            shutil.copyfileobj(file, copy)


def _sequences(source: SequenceSource, keys: Sequence[Any], tokenizer: Tokenizer) -> list[_Columns] | None:
    """Returns inputs, labels and documents of each sequence, as narrow as they are stored; None if too many."""
    sequences, tokens = list[_Columns](), 0
    for key in (keys[i] for i in range(len(keys))):
        batch = source.__getitems__([key])
        tokens += batch["input_ids"].numel()
        if tokens > MOST_TOKENS:
            return None
        inputs, labels, documents = (batch[name][0].numpy() for name in ("input_ids", "labels", "doc_ids"))
        narrow = inputs.astype(token_dtype(tokenizer.vocab_size)), labels.astype(np.int32), documents.astype(np.int32)
        sequences.append(narrow)
    return sequences


class HeldOutSequences:
    """Source of the sequences in a file; a key is the number of a sequence.

    A batch is as wide as its widest sequence, as it was where the data themselves were at hand.

    Raises:
        DataError: the folder is damaged.
    """

    def __init__(self, file: Path, pad_id: int, vocab_size: int) -> None:
        self._args, self._pad_id = (file, pad_id, vocab_size), pad_id
        arrays = _read_arrays(file, vocab_size)
        self._inputs, self._labels, self._documents, widths = (arrays[name] for name in _ARRAYS)
        self._bounds = np.concatenate([[0], np.cumsum(widths)])

    def __reduce__(self) -> tuple[type[HeldOutSequences], tuple[Path, int, int]]:
        # A worker started by spawn opens the file instead of receiving a copy of its content.
        return HeldOutSequences, self._args

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitems__(self, keys: list[int]) -> Batch:
        """Returns the sequences `keys`."""
        if not keys:
            return filler(max(1, int(np.diff(self._bounds).max(initial=0))), self._pad_id)
        spans = [(int(self._bounds[key]), int(self._bounds[key + 1])) for key in keys]
        shape = (len(keys), max(end - start for start, end in spans))
        input_BT = np.full(shape, self._pad_id, dtype=np.int64)
        labels_BT = np.full(shape, NO_TARGET, dtype=np.int64)
        docs_BT = np.full(shape, -1, dtype=np.int64)
        for row, (start, end) in enumerate(spans):
            input_BT[row, : end - start] = self._inputs[start:end]
            labels_BT[row, : end - start] = self._labels[start:end]
            docs_BT[row, : end - start] = self._documents[start:end]
        return to_batch(input_BT, labels_BT, docs_BT)


def _read_arrays(file: Path, vocab_size: int) -> dict[str, np.ndarray]:
    try:
        # The file may come from a stranger: a small one may unpack to more than the memory.
        with open_regular(file, "rb") as opened, zipfile.ZipFile(opened) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2**30:
                raise damaged(file)
        with np.load(file, allow_pickle=False) as arrays:
            read = {name: arrays[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, NotImplementedError, MemoryError):
        raise damaged(file) from None
    inputs, labels, documents, widths = (read[name] for name in _ARRAYS)
    kinds_fit = all(array.ndim == 1 and array.dtype.kind in "iu" for array in read.values())
    # Each width on its own first: a sum of huge ones would wrap around.
    if not kinds_fit or not len(widths) or widths.min() < 1 or widths.max() > len(inputs):
        raise damaged(file)
    if not len(inputs) == len(labels) == len(documents) == int(widths.sum()):
        raise damaged(file)
    targets = labels[labels != NO_TARGET]
    if any(len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size for ids in (inputs, targets)):
        raise damaged(file)
    return read


class HeldOutDataModule(TokenDataModule):
    """The held-out data of a run, and prompts for it; it cannot train.

    Args:
        folder: as `keep_held_out` has written it; None where only prompts are answered.
        options: see `TokenOptions`; `tokenizer` is the path of the run's `tokenizer.json`.

    Raises:
        DataError: in `prepare_data`, for a damaged folder.
    """

    def __init__(self, *, folder: str | None, **options: Unpack[TokenOptions]) -> None:
        super().__init__(**options)
        self.folder = None if folder is None else Path(folder)
        self._tokenizer = self.tokenizer_choice.read()
        self._questions: list[RecallItem] = []
        self._validation_questions: list[RecallItem] = []

    def prepared_sources(self) -> list[dict[str, Any]]:
        """Returns none: what a run keeps does not name them."""
        return []

    def cache_folder(self) -> Path:
        """Returns the folder of the run.

        Raises:
            DataError: there is none.
        """
        if self.folder is None:
            raise DataError("the weights come without held-out data; name some, as in data=text data.path=FILE.")
        return self.folder

    def prepare_data(self) -> None:
        """Opens the sequences, if there are any."""
        if self.folder is not None:
            self._splits = self.load(self.folder)

    def setup(self, stage: str | None = None) -> None:
        """Refuses a global batch that does not divide over the ranks."""
        if self.folder is not None:
            super().setup(stage)

    def load(self, folder: Path) -> Splits:
        """Opens the sequences and reads the questions.

        Raises:
            DataError: the folder is damaged.
        """
        ids = self._tokenizer.pad_id, self._tokenizer.vocab_size
        sequences = HeldOutSequences(folder / _SEQUENCES, *ids)
        # Not whether the file is there: without it the validation part would be tested.
        test = HeldOutSequences(folder / _TEST, *ids) if self._source().get("test") else None
        self._questions = self._validation_questions = read_questions(folder / _QUESTIONS)
        if self._source().get("validation_questions"):
            self._validation_questions = read_questions(folder / _VALIDATION_QUESTIONS)
        return Splits(
            tokenizer=self._tokenizer,
            train=sequences,
            order=ShuffledOrder(len(sequences), self.order_seed),
            validation=sequences,
            validation_keys=range(len(sequences)),
            test=test,
            test_keys=() if test is None else range(len(test)),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """That of the data which the folder was made from."""
        return str(self._source()["fingerprint"])

    @property
    def fact_space(self) -> FactSpace | None:
        """What the names and values of the sequences were drawn from; None where they are no such facts.

        Raises:
            DataError: the folder is damaged.
        """
        if self.folder is None or (sizes := self._source().get("fact_space")) is None:
            return None
        names = {field.name for field in fields(FactSpace)}
        if not isinstance(sizes, dict) or sizes.keys() != names or not all(map(_is_size, sizes.values())):
            raise damaged(self.folder / _SOURCE)
        return FactSpace(**sizes)

    def _source(self) -> dict[str, Any]:
        file = self.cache_folder() / _SOURCE
        source = read_json(file)
        if not isinstance(source, dict) or not isinstance(source.get("fingerprint"), str):
            raise damaged(file)
        return source

    def train_dataloader(self) -> DataLoader[Batch]:
        """Raises DataError: what a run keeps is for evaluation."""
        raise DataError("the held-out data of a run cannot be trained on; name the training data.")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns one pass over the sequences, shared out over the ranks.

        Raises:
            DataError: there are none.
        """
        self.cache_folder()
        return super().val_dataloader()

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` questions of the test per form."""
        return _first_of_each_form(self._questions, limit)

    def validation_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` questions of validations per form."""
        return _first_of_each_form(self._validation_questions, limit)


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**62


def _first_of_each_form(questions: Sequence[RecallItem], limit: int | None) -> list[RecallItem]:
    counts, items = Counter[str](), list[RecallItem]()
    for item in questions:
        counts[item.form] += 1
        if limit is None or counts[item.form] <= limit:
            items.append(item)
    return items
