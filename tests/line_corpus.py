"""Corpora for tests of what is made of documents: a line of a file is a document, `QUESTION|ANSWER` a question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.files import find_files
from pkm_lightning.data.sharded import CorpusDataModule
from pkm_lightning.errors import DataError

OPTIONS = {
    "seq_len": 16,
    "global_batch_size": 2,
    "num_workers": 0,
    "order_seed": 0,
    "prompts": [],
    "prompts_file": None,
    "tokenizer": "bytes",
    "vocab_size": 300,
    "special_tokens": [],
    "normalization": None,
    "tokenizer_pattern": None,
    "tokenizer_bytes": 100_000_000,
}
SPLIT = {"val_path": None, "test_path": None, "val_fraction": 0.2, "test_fraction": 0.0, "seed": 0}


class LineReader:
    """A document per line; one with ` ~ ` comes in a piece per side, `BAD` is malformed."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.skipped: Counter[str] = Counter({"files of other endings: .py": 2})

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        for file in range(first_file, len(self.files)):
            for record, line in enumerate(self.files[file].read_text().splitlines()):
                if not line.strip():
                    self.skipped["blank documents"] += 1
                    continue
                if line == "BAD":
                    raise DataError(f"{self.where(file, record)} is malformed.")
                *first, last = line.split(" ~")
                for part in first:
                    yield Piece(file, record, (Segment(part),), ends=False)
                yield Piece(file, record, segments_of(last))

    def where(self, file: int, record: int) -> str:
        return f"{self.files[file]}:{record + 1}"


def segments_of(line: str) -> tuple[Segment, ...]:
    question, bar, answer = line.partition("|")
    return (Segment(question, learned=False), Segment(answer)) if bar else (Segment(line),)


class LineCorpus(CorpusDataModule):
    """Data of `.lines` files."""

    kind = "lines"
    suffixes = (".lines",)

    def reader(self, path: str | Sequence[str], part: str = "train") -> LineReader:
        return LineReader(find_files(path, [".lines"]))

    def reading(self) -> dict[str, Any]:
        return {"lines": 1}


def line_corpus(path: Path | list[str], cache_dir: Path, **changes: Any) -> LineCorpus:
    """Returns the data of a path with small settings."""
    return LineCorpus(
        **{
            **OPTIONS,
            **SPLIT,
            "packing": "windows",
            "path": path if isinstance(path, list) else str(path),
            "cache_dir": str(cache_dir),
            **changes,
        }
    )


def content(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
