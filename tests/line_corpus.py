"""A data module over the documents of `line_reader`, for tests of what is made of documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from line_reader import LineReader

from pkm_lightning.data.files import find_files
from pkm_lightning.data.sharded import CorpusDataModule

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
