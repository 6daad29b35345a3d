"""Prepares lines in a process that tests kill; prints when it begins, and the folder when it is complete."""

from __future__ import annotations

import sys
from pathlib import Path

from line_reader import LineReader

from pkm_lightning.data.cache import CacheKey, Source, open_cache
from pkm_lightning.data.shards.build import build_shards
from pkm_lightning.data.split import Fractions
from pkm_lightning.data.tokenizer_choice import TokenizerChoice

FILES, CACHE = map(Path, sys.argv[1:])


def build(folder: Path) -> list[Source]:
    """Makes a shard per 20 kB of text: a process that is killed has many behind it."""
    build_shards(
        folder,
        readers=lambda: {"train": LineReader(sorted(FILES.iterdir()))},
        fractions=Fractions(0.1, 0.05, 0),
        choice=TokenizerChoice("bytes", 300),
        name="lines",
        shard_bytes=20_000,
    )
    return []


if __name__ == "__main__":
    print("begins", flush=True)
    print(open_cache(CACHE, CacheKey("lines", {}), build, resumes=True))
