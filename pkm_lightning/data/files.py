"""Finding the user's files: every error names what was given, what it is, and what is allowed."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pkm_lightning.errors import ConfigError, DataError

#: Endings of compressed files, which stand behind that of the content.
COMPRESSED = (".gz", ".zst")

#: Names of the lock of prepared data, and of the folder in which they are built.
_UNDER_WAY = re.compile(r"\..+\.(lock|part)")

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe, and is read more than once",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def expanded(path: str) -> Path:
    """Returns a path of the configuration with `~` and `$VARIABLE` filled in; Hydra passes both as they were typed."""
    # Not Path.expanduser, which raises where there is no home: then `~` stays, and is reported as missing.
    return Path(os.path.expanduser(os.path.expandvars(path)))


def check_paths(key: str, path: object) -> None:
    """Refuses a value of `key` that is neither a path nor a list of paths; an empty one means the working directory.

    Raises:
        ConfigError: naming the value and what is allowed.
    """
    listed = isinstance(path, Sequence) and not isinstance(path, str)
    entries = list(path) if listed else [path]  # type: ignore[call-overload]
    if not entries or not all(isinstance(entry, str) and entry.strip() for entry in entries):
        shown = path if isinstance(path, str) else entries if listed else "null" if path is None else path
        raise ConfigError(
            f"{key}={shown} names no files; give a file, a directory (. for the working directory), a glob, or a list "
            "of them."
        )


def require_file(name: str, file: Path, remedy: str) -> None:
    """Refuses what is not a regular file: a pipe or a device would be waited for, or read without an end.

    Args:
        name: of the file in messages, such as `data.tokenizer=x.json`.
        file: the path.
        remedy: what to do, without a full stop.

    Raises:
        DataError: it is missing, out of reach, or of another kind; names the kind.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name} does not exist; {remedy}.") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); {remedy}.") from None
    except ValueError:
        raise DataError(f"{name!r} holds a null character, which no path does; {remedy}.") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{name} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; {remedy}.")


def find_files(path: str | Sequence[str], suffixes: Sequence[str], key: str = "data.path") -> list[Path]:
    """Returns the files that `data.path` names, sorted within each entry, none twice.

    Args:
        path: a file, a directory (searched to any depth for `suffixes`), a glob (`**` spans directories), or a list.
        suffixes: such as ".txt"; files whose names go on with an ending of `COMPRESSED` are of that kind too.
        key: that `path` is the value of.

    Raises:
        ConfigError: if the list is empty.
        DataError: if an entry does not exist, cannot be read or matches nothing.
    """
    check_paths(key, path)
    # A dict as an ordered set: a file may match several entries.
    files: dict[Path, None] = {}
    for entry in [path] if isinstance(path, str) else path:
        files.update(dict.fromkeys(_matches(str(expanded(entry)), suffixes, key)))
    return list(files)


def skipped_files(path: str | Sequence[str], suffixes: Sequence[str]) -> Counter[str]:
    """Returns how many files with which other endings lie in the directories that `data.path` names."""
    folders = [expanded(entry) for entry in ([path] if isinstance(path, str) else path)]
    files = (file for folder in folders if os.path.isdir(folder) for file in _walk(folder))
    return Counter(_ending(file) or file.name for file in files if not _has_ending(file, suffixes))


def _ending(file: Path) -> str:
    """Returns the ending of a name, with that of the compressed content, such as `.csv.gz`."""
    inner = Path(file.stem).suffix if file.suffix in COMPRESSED else ""
    return inner + file.suffix


def _has_ending(file: Path, suffixes: Sequence[str]) -> bool:
    return _ending(file).removesuffix(file.suffix if file.suffix in COMPRESSED else "") in suffixes


def _matches(entry: str, suffixes: Sequence[str], key: str) -> list[Path]:
    patterns = ", ".join(f"*{suffix}" for suffix in suffixes)
    # os.path and not Path, whose methods raise for names that are too long.
    if os.path.isdir(entry):
        files = sorted(file for file in _walk(Path(entry)) if _has_ending(file, suffixes))
    # Before globs: the name of an existing file may hold brackets.
    elif os.path.exists(entry) or not glob.has_magic(entry):
        require_file(f"{key}={entry}", Path(entry), f"give a file, a directory with {patterns}, or a glob")
        files = [Path(entry)]
    else:
        files = sorted(Path(file) for file in glob.glob(entry, recursive=True) if Path(file).is_file())
    if not files:
        others = shown_endings(skipped_files(entry, suffixes))
        raise DataError(
            f"{key}={entry} matches no file; directories are searched for {patterns}"
            f"{f', and this one holds {others}' if others else ''}."
        )
    return files


def shown_endings(endings: Counter[str]) -> str:
    """Returns the most frequent endings with their numbers, such as `12 .gz, 3 .py`."""
    shown = [f"{count} {ending}" for ending, count in sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:5]]
    return ", ".join([*shown, "..."] if len(endings) > len(shown) else shown)


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the regular files at any depth; a directory that cannot be read would be text that is silently missing."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); check data.path and the permissions.")

    for place, folders, names in os.walk(folder, onerror=refuse):
        # `out` and the cache may lie beside the text that they are made of.
        folders[:] = [name for name in folders if not _is_prepared(Path(place, name))]
        files = (Path(place, name) for name in names if not _UNDER_WAY.fullmatch(name))
        yield from (file for file in files if file.is_file())


def _is_prepared(folder: Path) -> bool:
    """Returns whether a folder was written by `prepare` or `fit`, or is being written."""
    if _UNDER_WAY.fullmatch(folder.name):
        return True
    return (folder / "shards.json").is_file() and (folder / "manifest.json").is_file()


def file_identities(files: Sequence[Path]) -> list[list[Any]]:
    """Returns path, size and time of change of each file: enough to notice an edit without reading."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def read_text(file: Path) -> str:
    """Returns the content of a UTF-8 file.

    Raises:
        DataError: if it cannot be read, with the byte offset of what is not UTF-8.
    """
    try:
        # Some editors write a byte order mark.
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check data.path and the permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; convert it, for example with iconv.") from error


def split_lines(text: str) -> list[str]:
    """Returns the lines of a text without their ends, which are line feeds or carriage returns with line feeds."""
    return re.split(r"\r?\n", text)


def check_characters(where: str, text: str) -> None:
    """Refuses halves of surrogate pairs: JSON can spell them and command lines can hold them, but they encode nothing.

    Raises:
        DataError: naming the place, the escape and the characters before it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise DataError(
            f"{where} holds \\u{ord(text[error.start]):04x} after {before!r}, which is half of a character; correct "
            "it, or remove it."
        ) from None
