"""What a folder of shards must be before it is read: complete, unchanged since it was written, and consistent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import find_damage
from pkm_lightning.data.readers.fields import Kind
from pkm_lightning.data.shards.format import INDEX, PARTS, ShardInfo, token_type
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import DataError

__all__ = ["check_folder", "check_same_tokenizer", "default_packing", "holds_conversations", "require_folder"]

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
_AGAIN = "prepare it again, or restore it from a copy"


def require_folder(folder: Path, key: str) -> None:
    """Refuses what `prepare` has not written, by the names of its files; `key` named it, such as `data.path`.

    Raises:
        DataError: it is missing, or of other content.
    """
    advice = "set the folder that `prepare data=... out=FOLDER` has written"
    if not folder.is_dir():
        kind = "is not a directory" if folder.exists() else "does not exist"
        raise DataError(f"{key}={folder} {kind}; {advice}.")
    missing = [name for name in (MANIFEST, INDEX, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{key}={folder} holds no prepared tokens ({', '.join(missing)} missing); {advice}.")
    reason = _inconsistency(folder)
    if reason:
        raise DataError(f"{key}={folder} is damaged: {reason}; {_AGAIN}.")


def check_folder(folder: Path, key: str) -> None:
    """Refuses what `prepare` has not written, or not in this state.

    Raises:
        DataError: it is missing, of other content, or damaged.
    """
    require_folder(folder, key)
    damage = find_damage(folder, None)
    if damage:
        raise DataError(f"{key}={folder} is damaged: {damage}; {_AGAIN}.")


def default_packing(folder: Path) -> str:
    """Returns the packing that the data source has by default which a folder was prepared from."""
    index = read_index(folder)
    shards = (ShardInfo(**shard) for part in PARTS for shard in index["parts"].get(part, []))
    # Windows would part answers from their questions.
    whole = "records" in index or any(shard.targets < shard.tokens for shard in shards)
    return "documents" if whole else "windows"


def holds_conversations(folder: Path) -> bool:
    """Returns whether the documents of a folder are conversations."""
    return read_index(folder).get("records") == Kind.CONVERSATION.value


def check_same_tokenizer(first: Path, first_key: str, second: Path, second_key: str) -> None:
    """Refuses two folders of shards whose ids mean different words.

    Raises:
        DataError: naming both.
    """
    one, two = (Tokenizer.load(folder / TOKENIZER).digest for folder in (first, second))
    if one != two:
        raise DataError(
            f"{second_key}={second} was tokenised by another tokenizer than {first_key}={first}; prepare it with "
            f"data.tokenizer={first / TOKENIZER}."
        )


def _inconsistency(folder: Path) -> str | None:
    """Returns what in `shards.json` does not fit the files beside it, or None."""
    try:
        index = read_index(folder)
        vocab_size, parts = index["vocab_size"], index["parts"]
        named = [ShardInfo(**shard) for part in PARTS for shard in parts.get(part, [])]
        counts = [vocab_size, *(n for shard in named for n in (shard.tokens, shard.documents, shard.targets))]
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{INDEX} is not one of this package"
    for shard in named:
        # A name with a directory in it would lead out of the folder.
        if Path(shard.name).name != shard.name:
            return f"{INDEX} names {shard.name}, which is no name of a file"
        for name, size in _sizes(shard, token_type(vocab_size)).items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} does not hold what {INDEX} says"
    return None


def _sizes(shard: ShardInfo, dtype: Any) -> dict[str, int]:
    sizes = {
        f"{shard.name}.tokens": shard.tokens * dtype.itemsize,
        f"{shard.name}.begins": shard.documents * 8,
        f"{shard.name}.places": shard.documents * 8,
    }
    if shard.targets != shard.tokens:
        sizes[f"{shard.name}.learned"] = -(-shard.tokens // 8)
    return sizes
