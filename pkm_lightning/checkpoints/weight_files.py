"""The tensors in safetensors files of any origin: one file, or a folder of several with an index or without one."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from pkm_lightning.checkpoints.safetensors import Entry, read_entries
from pkm_lightning.errors import CheckpointError
from pkm_lightning.storage import open_regular


def stored_entries(path: Path, key: str) -> dict[str, tuple[Path, Entry]]:
    """Returns file and place of each tensor of a file, or of all files of a folder; only headers are read.

    Args:
        path: of the file or folder.
        key: what the path is called in messages, such as `table.path=`.

    Raises:
        CheckpointError: there is no such file, one of an index is missing, or one is damaged.
    """
    stamp(path, key)
    places = {}
    for file in _files(path, key):
        try:
            entries = _entries(file, _stamp(file))
            places.update({name: (file, entry) for name, entry in entries.items()})
        except OSError as error:
            raise CheckpointError(f"{key}{path}: {file.name} cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise CheckpointError(f"{key}{path}: {file.name} is no whole safetensors file ({error}).") from None
    return places


def stamp(path: Path, key: str) -> tuple[int, int, int]:
    """Returns what changes with a file, so that its header and digest are read once.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return _stamp(path)
    except OSError as error:
        raise CheckpointError(
            f"{key}{path} cannot be read ({error.strerror}); it holds the rows of a table: put it back, or name the "
            f"file with {key}FILE."
        ) from None


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _entries(file: Path, of_file: tuple[int, int, int]) -> dict[str, Entry]:
    return read_entries(file)


def _files(path: Path, key: str) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if index is not None:
        try:
            with open_regular(index, encoding="utf-8") as file:
                listed = json.load(file)["weight_map"].values()
            # `name`: an index of somebody else's must not name files elsewhere.
            names = sorted({Path(str(name)).name for name in listed})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{key}{path}: {index.name} is unreadable; restore it.") from None
    if not names:
        raise CheckpointError(f"{key}{path} holds no .safetensors file; give the file or folder with the weights.")
    yield from (path / name for name in names)
