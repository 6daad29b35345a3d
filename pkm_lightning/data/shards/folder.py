"""What a folder of shards must be before it is read: complete, unchanged since it was written, and consistent."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import find_damage, sha256_file
from pkm_lightning.data.shards.format import INDEX, PARTS, ShardInfo, token_type
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import DataError

__all__ = ["check_folder", "check_same_tokenizer", "require_folder"]

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


def check_folder(folder: Path, key: str, checked: Path) -> None:
    """Refuses what `prepare` has not written, or not in this state.

    Reading all files takes about a second per GB, so the folders that passed are noted, with size and time of change of
    each file, in the folder `checked`.

    Raises:
        DataError: it is missing, of other content, or damaged.
    """
    require_folder(folder, key)
    note = checked / _state(folder)
    if note.exists():
        return
    damage = find_damage(folder, None)
    if damage:
        raise DataError(f"{key}={folder} is damaged: {damage}; {_AGAIN}.")
    with contextlib.suppress(OSError):  # then it is read again next time
        checked.mkdir(parents=True, exist_ok=True)
        note.touch()


def _state(folder: Path) -> str:
    """Returns a hash of the folder's manifest, and of place, size and time of change of its files."""
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return hashlib.sha256(f"{folder.resolve()} {sha256_file(folder / MANIFEST)} {states}".encode()).hexdigest()


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
