"""Complete folders of shards as `prepare` leaves them, with chosen documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pkm_lightning.data.cache import CacheKey, Source, open_cache
from pkm_lightning.data.shards.format import ShardInfo, ShardWriter
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer

EOS = bytes_tokenizer().eos_id
VOCAB = 258
#: A document: its tokens, and how many of them, from the first one on, are no targets.
Document = tuple[Sequence[int], int]


def text(words: str, unlearned: int = 0) -> Document:
    """Returns a document of the byte tokenizer."""
    return [*bytes_tokenizer().encode(words), EOS], unlearned


def write_part(folder: Path, part: str, documents: Sequence[Document], shard_tokens: int) -> list[ShardInfo]:
    """Writes the documents into shards of exactly `shard_tokens`, so that documents cross their borders."""
    infos: list[ShardInfo] = []
    writer = ShardWriter(folder, f"{part}-00000", VOCAB)
    for number, (tokens, unlearned) in enumerate(documents):
        if writer.tokens == shard_tokens:
            infos.append(writer.close())
            writer = ShardWriter(folder, f"{part}-{len(infos):05}", VOCAB)
        writer.begin_document(0, number)
        for learned, ids in ((False, list(tokens[:unlearned])), (True, list(tokens[unlearned:]))):
            while ids:
                if writer.tokens == shard_tokens:
                    infos.append(writer.close())
                    writer = ShardWriter(folder, f"{part}-{len(infos):05}", VOCAB)
                fitting = shard_tokens - writer.tokens
                writer.write(np.asarray(ids[:fitting]), learned=learned)
                ids = ids[fitting:]
    info = writer.close()
    return [*infos, info] if info.tokens else infos


def write_shards(
    folder: Path, parts: Mapping[str, Sequence[Document]], *, shard_tokens: int = 50, vocab_size: int = VOCAB
) -> None:
    """Writes the parts and their index, without tokenizer and manifest."""
    shards = {part: write_part(folder, part, documents, shard_tokens) for part, documents in parts.items()}
    index = {
        "vocab_size": vocab_size,
        "parts": {part: [asdict(info) for info in infos] for part, infos in shards.items()},
        "read": {"files": 1, "documents": sum(map(len, parts.values())), "bytes": 0},
        "skipped": {},
    }
    (folder / "shards.json").write_text(json.dumps(index))


def write_folder(
    root: Path,
    parts: Mapping[str, Sequence[Document]],
    *,
    shard_tokens: int = 50,
    questions: Sequence[tuple[str, str]] = (),
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Returns a folder below `root`, as `prepare` leaves it, with the parts and the byte tokenizer or another one."""

    def build(folder: Path) -> list[Source]:
        (tokenizer or bytes_tokenizer()).save(folder / "tokenizer.json")
        write_shards(folder, parts, shard_tokens=shard_tokens)
        (folder / "questions.json").write_text(json.dumps(list(questions)))
        return [Source("test", files={"file": "0"})]

    content = {part: [[list(map(int, tokens)), n] for tokens, n in documents] for part, documents in parts.items()}
    arguments = {"parts": content, "shard_tokens": shard_tokens, "other": tokenizer is not None}
    return open_cache(root, CacheKey("shards", arguments), build)
