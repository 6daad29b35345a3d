"""Data modules over shards of tokenised text: those that build them from the user's files, and those that read them."""

from __future__ import annotations

import json
import logging
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, Unpack

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.batch import SequenceSource
from pkm_lightning.data.cache import VERIFIED_BYTES, CacheKey, Source, open_cache, sha256_file
from pkm_lightning.data.datamodule import Splits, TokenDataModule, TokenOptions
from pkm_lightning.data.documents import Reader
from pkm_lightning.data.files import COMPRESSED, check_paths, file_identities
from pkm_lightning.data.order import Order, ShuffledOrder
from pkm_lightning.data.packing import PieceOrder
from pkm_lightning.data.pieces import ConsecutivePieces, Pieces, write_pieces
from pkm_lightning.data.sequences import DocumentSequences, WindowSequences
from pkm_lightning.data.shards.build import build_shards
from pkm_lightning.data.shards.content import content_lines
from pkm_lightning.data.shards.format import PARTS
from pkm_lightning.data.shards.mapped import TokenShards, read_index
from pkm_lightning.data.split import Fractions
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import ConfigError, DataError, check_choice, check_range, counted

PACKINGS = ["windows", "documents", "none"]
#: The keys of the files of parts.
PATH_KEYS = {"train": "data.path", "validation": "data.val_path", "test": "data.test_path"}
#: What messages call the parts.
SHOWN = {"train": "training", "validation": "validation", "test": "test"}

#: The sequences of a part, and their keys in their own order.
Opened: TypeAlias = "tuple[SequenceSource, Sequence[Any]]"

log = logging.getLogger(__name__)


class ShardedDataModule(TokenDataModule):
    """Base of data sources whose prepared data are shards.

    Args:
        packing: `windows` cuts the documents, laid end to end, into sequences of `seq_len`; `documents` fills sequences
            with whole documents, of which only those longer than a sequence are cut; `none` makes each document a
            sequence, padded to the longest of its batch. None only where prepared data decide.
        options: see `TokenOptions`.
    """

    def __init__(self, *, packing: str | None, **options: Unpack[TokenOptions]) -> None:
        super().__init__(**options)
        if packing is not None:
            check_choice("data.packing", packing, PACKINGS)
        self.packing = packing

    def view(self) -> dict[str, Any]:
        """Returns sequence length and packing."""
        return {"seq_len": self.seq_len, "packing": self.packing}

    def content(self) -> list[str]:
        """Returns what was read, the tokens of each part, and what was skipped."""
        return content_lines(read_index(self.cache_folder()))

    def load(self, folder: Path) -> Splits:
        """Opens the shards, and derives the pieces of documents that sequences are filled with.

        Raises:
            ConfigError: a prompt with its answer is longer than a sequence; names its place and the length needed.
            DataError: a part holds less than one sequence.
        """
        return self.open_parts({part: TokenShards(folder, part) for part in PARTS}, folder)

    def open_parts(self, parts: Mapping[str, TokenShards], folder: Path) -> Splits:
        """Returns the sequences of the parts `train`, `validation` and `test`, whose tokenizer lies in `folder`.

        Raises:
            ConfigError, DataError: see `load`.
        """
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        parts = {part: shards for part, shards in parts.items() if part != "test" or shards.n_tokens}
        opened = self._windows(parts, tokenizer) if self.packing == "windows" else self._documents(parts, tokenizer)
        for part, (_, keys) in opened.items():
            if not len(keys):
                raise DataError(
                    f"{self.place(part)}: the {SHOWN[part]} part has {parts[part].n_tokens} tokens, a sequence of "
                    f"data.seq_len={self.seq_len} needs {self.seq_len + 1 if self.packing == 'windows' else 2}; "
                    f"{self.remedy(part)}."
                )
        (train, keys), (validation, validation_keys) = opened["train"], opened["validation"]
        test, test_keys = opened.get("test", (None, ()))
        return Splits(
            tokenizer=tokenizer,
            train=train,
            order=self._order(train, len(keys)),
            validation=validation,
            validation_keys=validation_keys,
            test=test,
            test_keys=test_keys,
        )

    def place(self, part: str) -> str:
        """Returns the key and value that name the files of a part, for messages."""
        return f"data.path={getattr(self, 'path', None)}"

    def remedy(self, part: str) -> str:
        """Returns what to do where a part holds less than one sequence."""
        return "lower data.seq_len or add text"

    def where(self, part: str, file: int, record: int) -> str:
        """Returns the place of a document for messages; both numbers count from 0."""
        return f"{self.place(part)}: record {record + 1} of file {file + 1}"

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` validation prompts with answers, without options; plain text has none."""
        file = self.questions_folder() / "questions.json"
        questions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return [
            RecallItem(prompt, answer, (), "record", "validation", 0, 0, math.nan, False)
            for prompt, answer in questions[:limit]
        ]

    def questions_folder(self) -> Path:
        """Returns the folder of the shards whose validation part is asked about."""
        return self.cache_folder()

    def _windows(self, parts: Mapping[str, TokenShards], tokenizer: Tokenizer) -> dict[str, Opened]:
        options = {"seq_len": self.seq_len, "pad_id": tokenizer.pad_id}
        sources = {part: WindowSequences(shards, **options) for part, shards in parts.items()}
        return {part: (source, range(len(source))) for part, source in sources.items()}

    def _documents(self, parts: Mapping[str, TokenShards], tokenizer: Tokenizer) -> dict[str, Opened]:
        def build(folder: Path) -> list[Source]:
            write_pieces(folder, parts, self.seq_len, self.where)
            return []

        arguments = {"parts": {part: shards.identity() for part, shards in parts.items()}, "seq_len": self.seq_len}
        folder = open_cache(self.usable_cache_dir(), CacheKey("pieces", arguments), build)
        capacity = self.seq_len if self.packing == "documents" else None
        opened: dict[str, Opened] = {}
        for part, shards in parts.items():
            pieces = Pieces(folder, part)
            source = DocumentSequences(shards, pieces, width=capacity, pad_id=tokenizer.pad_id)
            opened[part] = (source, ConsecutivePieces.of(folder, part, pieces, capacity))
        return opened

    def _order(self, train: SequenceSource, windows: int) -> Order:
        if isinstance(train, DocumentSequences):
            capacity = self.seq_len if self.packing == "documents" else None
            return PieceOrder(train.pieces.lengths, capacity=capacity, seed=self.order_seed)
        return ShuffledOrder(windows, self.order_seed)


class CorpusDataModule(ShardedDataModule):
    """Base of data sources over files of the user's, which are tokenised once into shards.

    Args:
        path: a file, a directory (searched at any depth), a glob, or a list of them.
        val_path, test_path: the same for files that only validate or test; None takes a share of the documents of
            `path`.
        val_fraction: share of the documents that is held out for validation, 0.001 to 0.5; no effect with `val_path`.
        test_fraction: likewise for testing, 0 to 0.5; 0 without `test_path`: the validation part is tested.
        seed: decides which documents are held out.
        packing, options: see `ShardedDataModule`.

    Raises:
        ConfigError: for a value out of range.
    """

    #: The readable part of the name of the cache folder.
    kind: ClassVar[str]
    resumes_build = True

    def __init__(
        self,
        *,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None,
        test_path: str | Sequence[str] | None,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        packing: str,
        **options: Unpack[TokenOptions],
    ) -> None:
        check_choice("data.packing", packing, PACKINGS)
        super().__init__(packing=packing, **options)
        check_paths("data.path", path)
        for part, other in (("validation", val_path), ("test", test_path)):
            if other is not None:
                check_paths(PATH_KEYS[part], other)
        check_range("data.val_fraction", val_fraction, low=0.001, high=0.5)
        check_range("data.test_fraction", test_fraction, low=0, high=0.5)
        check_range("data.seed", seed, low=0)
        if test_path is not None and test_fraction:
            raise ConfigError(f"data.test_fraction={test_fraction} and data.test_path={test_path}: set one of them.")
        self.path = path if isinstance(path, str) else tuple(path)
        self.val_path, self.test_path = (
            other if other is None or isinstance(other, str) else tuple(other) for other in (val_path, test_path)
        )
        self.fractions = Fractions(val_fraction, test_fraction, seed)

    def place(self, part: str) -> str:
        """Returns the key and value that name the files of a part."""
        return f"{PATH_KEYS[self._holder(part)]}={self._paths()[self._holder(part)]}"

    def remedy(self, part: str) -> str:
        """Returns what to do where a part holds less than one sequence."""
        if part == self._holder(part):
            return f"lower data.seq_len or add text to {PATH_KEYS[part]}"
        return f"raise data.{'val' if part == 'validation' else 'test'}_fraction, lower data.seq_len or add text"

    def where(self, part: str, file: int, record: int) -> str:
        """Returns the place of a document, such as `answers.jsonl:12`."""
        holder = self._holder(part)
        return self.reader(self._paths()[holder], holder).where(file, record)

    def _holder(self, part: str) -> str:
        """Returns the part whose files hold the documents of `part`: itself, or training where it has no files."""
        return part if part in self._paths() else "train"

    @abstractmethod
    def reader(self, path: str | Sequence[str], part: str) -> Reader:
        """Returns the documents of a part's own files; finds them, and reads nothing yet."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """Returns the arguments that decide which documents the files hold; part of the cache key."""

    def cache_key(self) -> CacheKey:
        """Returns the state of the files, how they are read and split, and the tokenizer."""
        arguments = {
            "data": self.kind,
            **{f"{part} files": _identities(reader.files) for part, reader in self._readers().items()},
            **self.reading(),
            **{name: value for name, value in self._fractions().items() if value},
            "seed": self.fractions.seed,
            "tokenizer": self.tokenizer_choice.identity(),
        }
        return CacheKey(self.kind, arguments)

    def build(self, folder: Path) -> list[Source]:
        """Tokenises the files into shards, after training the tokenizer on the training part where it is trained."""
        readers = self._readers()
        before = {part: _identities(reader.files) for part, reader in readers.items()}
        self._warn_of_shared_files(readers)
        build_shards(
            folder,
            readers=self._readers,
            fractions=self.fractions,
            choice=self.tokenizer_choice,
            name=f"data.path={self.path}",
        )
        for part, reader in readers.items():
            for earlier, now in zip(before[part], _identities(reader.files), strict=True):
                if earlier != now:
                    raise DataError(f"{now[0]} has changed while it was prepared; start again when it is complete.")
        return [_source(reader.files, str(self._paths()[part])) for part, reader in readers.items()]

    def _warn_of_shared_files(self, readers: Mapping[str, Reader]) -> None:
        training = set(readers["train"].files)
        for part, reader in readers.items():
            shared = [file for file in reader.files if file in training]
            if part != "train" and shared:
                log.warning(
                    "%s: %s, %s among them, %s also in data.path: the %s part holds documents that were trained on.",
                    self.place(part),
                    counted(len(shared), "file"),
                    shared[0],
                    "is" if len(shared) == 1 else "are",
                    SHOWN[part],
                )

    def _paths(self) -> dict[str, str | Sequence[str]]:
        """Returns the paths of the parts that have files of their own."""
        paths = {"train": self.path, "validation": self.val_path, "test": self.test_path}
        return {part: path for part, path in paths.items() if path is not None}

    def _readers(self) -> dict[str, Reader]:
        return {part: self.reader(path, part) for part, path in self._paths().items()}

    def _fractions(self) -> dict[str, float]:
        """Returns the fractions that have an effect."""
        fractions = {"val_fraction": self.fractions.validation, "test_fraction": self.fractions.test}
        return {name: 0.0 if name == "val_fraction" and self.val_path else value for name, value in fractions.items()}


def refuse_windows(place: str) -> None:
    """Refuses windows over conversations; `place` is the key and value that name them.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"data.packing=windows would cut the conversations of {place} anywhere, and part answers from their questions; "
        "set data.packing=documents or data.packing=none."
    )


def check_endings(endings: object) -> None:
    """Refuses a value of `data.endings` that is no list of endings.

    Raises:
        ConfigError: naming the value and what is allowed.
    """
    listed = isinstance(endings, Sequence) and not isinstance(endings, str)
    values: list[Any] = list(endings) if listed else [endings]  # type: ignore[call-overload]
    wrong = [value for value in values if not isinstance(value, str) or not re.fullmatch(r"\.[^./\s]+", value)]
    if wrong or not listed or not values:
        shown = f"[{', '.join(map(str, values))}]" if listed else values[0]
        # One ending lacks only the brackets.
        example = ".txt,.md" if wrong or listed else values[0]
        raise ConfigError(f"data.endings={shown} is not a list of endings; write data.endings=[{example}].")
    packed = [value for value in values if value in COMPRESSED]
    if packed:
        raise ConfigError(
            f"data.endings=[{', '.join(values)}]: {packed[0]} is found behind every ending by itself; leave it out."
        )


def _identities(files: Sequence[Path]) -> list[list[Any]]:
    """Returns the state of the files, and the name of what is no file."""
    return [file_identities([file])[0] if file.exists() else [str(file)] for file in files]


def _source(files: Sequence[Path], name: str) -> Source:
    """Returns the manifest's entry of files, with their hashes unless these would take long to compute."""
    real = [file for file in files if file.is_file()]
    if sum(file.stat().st_size for file in real) > VERIFIED_BYTES:
        return Source(name, files={str(f): f"{f.stat().st_size} bytes of {f.stat().st_mtime_ns}" for f in real})
    return Source(name, files={str(file): sha256_file(file) for file in real})
