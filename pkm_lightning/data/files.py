"""Finding and reading the user's files: every error names the file, and the line or byte where it can."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pkm_lightning.errors import ConfigError, DataError


def find_files(path: str | Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Returns the files that `data.path` names, sorted within each entry, none twice.

    Args:
        path: a file, a directory (searched to any depth for `suffixes`), a glob (`**` spans directories), or a list.
        suffixes: such as ".txt".

    Raises:
        ConfigError: if the list is empty.
        DataError: if an entry does not exist or matches nothing.
    """
    entries = [path] if isinstance(path, str) else list(path)
    if not entries:
        raise ConfigError("data.path=[] names no files; give a file, a directory, a glob or a list of them.")
    # A dict as an ordered set: a file may match several entries.
    files: dict[Path, None] = {}
    for entry in entries:
        files.update(dict.fromkeys(_matches(str(Path(entry).expanduser()), suffixes)))
    return list(files)


def _matches(entry: str, suffixes: Sequence[str]) -> list[Path]:
    patterns = ", ".join(f"*{suffix}" for suffix in suffixes)
    if Path(entry).is_dir():
        files = sorted(file for file in Path(entry).rglob("*") if file.suffix in suffixes and file.is_file())
    # Before globs: the name of an existing file may hold brackets.
    elif Path(entry).exists():
        if not Path(entry).is_file():
            raise DataError(f"data.path={entry} is a pipe or a device, which cannot be read again; save it as a file.")
        files = [Path(entry)]
    elif glob.has_magic(entry):
        files = sorted(Path(file) for file in glob.glob(entry, recursive=True) if Path(file).is_file())
    else:
        raise DataError(f"data.path={entry} does not exist; give a file, a directory with {patterns}, or a glob.")
    if not files:
        raise DataError(f"data.path={entry} matches no file; directories are searched for {patterns}.")
    return files


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


def read_documents(file: Path, document_separator: int | None) -> list[str]:
    """Returns the documents of a text file that are not blank.

    Args:
        file: UTF-8 text.
        document_separator: blank lines (or more) that end a document; None makes the file one document.
    """
    text = read_text(file)
    parts = [text] if document_separator is None else re.split(rf"\n(?:[ \t\r]*\n){{{document_separator},}}", text)
    return [part for part in parts if part.strip()]


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a .jsonl file with their place, as `file:line`; blank lines are skipped.

    Raises:
        DataError: naming file and line, if a line is not a JSON object.
    """
    # Not splitlines(): JSON text may hold U+2028 and other characters that Python takes for ends of lines.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error.msg}); each line must be one object.") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is a JSON {type(record).__name__}; each line must be one object with fields.")
        yield where, record


def text_field(where: str, record: dict[str, Any], field: str) -> str:
    """Returns the text in `field`, without surrounding white space.

    Raises:
        DataError: naming file, line and the fields present, if it is missing, blank or not text.
    """
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        problem = "is missing" if field not in record else "is blank" if isinstance(value, str) else "is not text"
        raise DataError(
            f"{where}: field '{field}' {problem} (fields present: {', '.join(record)}); correct the record or set "
            "data.text_field, data.prompt_field and data.answer_field."
        )
    return value.strip()
