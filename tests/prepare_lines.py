"""Prepares lines in a process that tests kill; prints when it begins, and the folder when it is complete."""

from __future__ import annotations

import sys
from pathlib import Path

from line_corpus import line_corpus

from pkm_lightning.data import sharded
from pkm_lightning.data.shards.build import build_shards

if __name__ == "__main__":
    # A shard per 20 kB of text: a killed process has many behind it.
    sharded.build_shards = lambda *args, **keywords: build_shards(*args, **keywords, shard_bytes=20_000)  # type: ignore[assignment]
    print("begins", flush=True)
    print(line_corpus(Path(sys.argv[1]), Path(sys.argv[2]), tokenizer="bpe", vocab_size=300).cache_folder())
