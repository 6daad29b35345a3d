"""Lines of JSON: records with the texts of a document, each with its place.

Lines end with a line feed, with or without a carriage return before it, and with nothing else: texts hold U+2028,
U+0085, form feeds and other characters that `str.splitlines` takes for ends of lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pkm_lightning.data.files import check_characters
from pkm_lightning.data.readers.decoding import Advance, ignore, text_blocks
from pkm_lightning.errors import DataError

__all__ = ["kind_of", "parse_record", "read_lines", "read_records", "text_field"]

#: What names the fields, for messages.
KEYS_OF_FIELDS = "data.text_field, data.prompt_field and data.answer_field, or data.messages_field"
#: A record is held in memory, several times over while it is parsed.
MAX_LINE_CHARACTERS = 2**26


def read_records(file: Path, advance: Advance = ignore) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a .jsonl file with the numbers of their lines, from 1; blank lines are skipped.

    Numbers are floats, and objects within the fields are tuples of pairs: a record is read for its texts.

    Raises:
        DataError: naming file and line, if a line is not a JSON object, has a field twice, or is too long.
    """
    for number, line in enumerate(read_lines(text_blocks(file, advance), str(file)), start=1):
        if line.strip():
            yield number, parse_record(f"{file}:{number}", line)


def read_lines(blocks: Iterable[str], name: str) -> Iterator[str]:
    """Yields the lines of a text in blocks, without their ends.

    Raises:
        DataError: a line of the file `name` has more than `MAX_LINE_CHARACTERS` characters.
    """
    begun: list[str] = []
    size = number = 0
    for block in blocks:
        first, *others = block.split("\n")
        begun.append(first)
        size += len(first)
        if size > MAX_LINE_CHARACTERS:
            raise DataError(
                f"{name}:{number + 1} has more than {MAX_LINE_CHARACTERS:,} characters; write one object per line, and "
                "read longer texts with data=text."
            )
        if others:
            yield "".join(begun).removesuffix("\r")
            yield from (line.removesuffix("\r") for line in others[:-1])
            number += len(others)
            begun, size = [others[-1]], len(others[-1])
    yield "".join(begun)


def parse_record(where: str, line: str) -> dict[str, Any]:
    """Returns the fields of a line.

    Raises:
        DataError: it is not a JSON object, or has a field twice.
    """
    try:
        # `parse_int`: Python refuses to convert more than 4,300 digits to an integer.
        record = json.loads(line, parse_int=float, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}); each line must be one object.") from error
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; each line must be one object with fields.") from None
    if not isinstance(record, tuple):
        raise DataError(f"{where} is a JSON {kind_of(record)}; each line must be one object with fields.")
    return unique_fields(where, record)


def unique_fields(where: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of an object.

    Raises:
        DataError: it has one of them twice.
    """
    pairs = tuple(pairs)
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise DataError(f"{where} has the field '{name}' more than once; leave one of them.")
    return fields


def kind_of(value: object) -> str:
    """Returns what JSON calls the kind of a value."""
    name = type(value).__name__
    return {"float": "number", "str": "text", "NoneType": "null", "tuple": "object", "dict": "object"}.get(name, name)


def text_field(
    where: str, record: Mapping[str, Any], field: str, present: Callable[[], Collection[str] | None] = lambda: None
) -> str:
    """Returns the text in `field`, without surrounding white space.

    Args:
        where: names the record in messages.
        record: its fields, or those of them that are read.
        field: the name.
        present: returns the names of all fields where `record` has some of them; asked for messages only.

    Raises:
        DataError: naming the place and the fields present, if it is missing, blank, not text, or half a character.
    """
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        names = present() if field in record else None
        shown = ", ".join(names or record)
        raise DataError(
            f"{where}: field '{field}' {_problem(record, field)} (fields present: {shown}); correct the record or set "
            f"{KEYS_OF_FIELDS}{', or data.skip_nulls=true' if field in record and value is None else ''}."
        )
    check_characters(f"{where}: field '{field}'", value)
    return value.strip()


def _problem(record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        return "is missing"
    value = record[field]
    if value is None or isinstance(value, str):
        return "is null" if value is None else "is blank"
    kind = kind_of(value)
    nested = f" but a {'struct' if kind == 'object' else 'list'}, and nothing nested is read"
    return f"is not text{nested if kind in ('object', 'list') else ''}"
