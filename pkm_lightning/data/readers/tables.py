"""The rows of local files with columns: Parquet, Arrow, CSV and JSON, a few rows at a time.

Parquet and Arrow come through pyarrow, which `datasets` brings (extra `data`). Of the columns only those with the texts
are read, and nothing is copied into a cache.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pkm_lightning.data.files import COMPRESSED
from pkm_lightning.data.readers.decoding import Advance, ignore, text_blocks
from pkm_lightning.data.readers.records import MAX_LINE_CHARACTERS, kind_of, read_records, unique_fields
from pkm_lightning.errors import DataError, missing_extra

__all__ = ["TABLE_ENDINGS", "columns_of", "rows_of", "table_kind"]

#: Rows that are held at once: some have megabytes of text.
ROWS = 128
#: Bytes that are read ahead per column of a Parquet file.
READ_AHEAD = 2**20
#: A JSON file that is one list is held in memory as a whole.
MAX_LIST_CHARACTERS = 2**28

Row = Mapping[str, Any]


def table_kind(file: Path) -> str:
    """Returns the ending of a file without that of compression, such as `.csv`."""
    return (Path(file.stem) if file.suffix in COMPRESSED else file).suffix


def columns_of(file: Path) -> list[str] | None:
    """Returns the columns of a file, or the fields of its first record; None where it has no row.

    Raises:
        DataError: it cannot be read.
    """
    rows = _KINDS[table_kind(file)](file, None, ignore)
    try:
        return next((list(row) for row in rows), None)
    finally:
        rows.close()


def rows_of(file: Path, names: Sequence[str], advance: Advance = ignore) -> Iterator[Row]:
    """Yields the rows of a file, with the columns `names`; `advance` takes the position in the file now and then.

    Raises:
        DataError: it cannot be read, or lacks one of the columns; names those that it has.
    """
    return _KINDS[table_kind(file)](file, names, advance)


def _arrow(file: Path, names: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    return _batched(file, names, advance, _arrow_batches)


def _parquet(file: Path, names: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    return _batched(file, names, advance, _parquet_batches)


def _batched(
    file: Path,
    names: Sequence[str] | None,
    advance: Advance,
    batches: Callable[[Path, Sequence[str] | None], Iterator[tuple[Any, float]]],
) -> Iterator[Row]:
    """Yields rows of record batches; errors name the file, and the row that was to come next.

    Args:
        file, names, advance: see `rows_of`.
        batches: yields record batches, each with the share of the file that lies before its end.
    """
    try:
        import pyarrow
    except ImportError:
        raise missing_extra(str(file), "pyarrow", "data") from None
    row = 0
    try:
        size = file.stat().st_size
        for batch, share in batches(file, names):
            advance(int(share * size))
            # A damaged file may hold offsets that point outside of it.
            batch.validate(full=True)
            for fields in batch.to_pylist():
                yield fields
                row += 1
    except OSError as error:
        raise _unreadable(file, row, error.strerror or str(error)) from None
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise _unreadable(file, row, str(error)) from None


def _unreadable(file: Path, row: int, reason: str) -> DataError:
    reason = " ".join(reason.split()).rstrip(".")
    return DataError(
        f"{file} cannot be read from row {row} on ({reason:.200}); it is damaged or incomplete, copy or write it again."
    )


def _parquet_batches(file: Path, names: Sequence[str] | None) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet

    # `buffer_size` reads pages; without it the columns of a row group are read as a whole.
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_AHEAD) as table:
        _check_columns(file, table.schema_arrow.names, names)
        columns, rows = None if names is None else list(names), 0
        for batch in table.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
            rows += batch.num_rows
            yield batch, rows / max(rows, table.metadata.num_rows)


def _arrow_batches(file: Path, names: Sequence[str] | None) -> Iterator[tuple[Any, float]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(mapped)
            n = reader.num_record_batches
            batches: Iterable[tuple[Any, float]] = ((reader.get_batch(i), (i + 1) / n) for i in range(n))
        else:
            reader = pyarrow.ipc.open_stream(mapped)
            batches = ((batch, mapped.tell() / mapped.size()) for batch in reader)
        _check_columns(file, reader.schema.names, names)
        for batch, share in batches:
            chosen = batch if names is None else batch.select(list(names))
            # Checked before it is cut: a part of a column with damaged offsets may lie anywhere.
            chosen.validate(full=True)
            for begin in range(0, chosen.num_rows, ROWS):
                yield chosen.slice(begin, ROWS), share


def _check_columns(file: Path, present: Sequence[str], names: Sequence[str] | None) -> None:
    for name in names or ():
        if name not in present:
            raise DataError(
                f"{file} has no column '{name}' (columns present: {', '.join(present)}); set data.text_field, "
                "data.prompt_field and data.answer_field, or data.messages_field."
            )
        if list(present).count(name) > 1:
            raise DataError(f"{file} has the column '{name}' more than once; leave one of them.")


def _csv(file: Path, names: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """Yields the rows of a CSV file, whose first row names the columns."""
    limit = csv.field_size_limit(MAX_LINE_CHARACTERS)
    row = -1
    try:
        # `strict`: else a quote at a wrong place would join rows silently.
        rows = csv.reader(_lines_with_ends(text_blocks(file, advance)), strict=True)
        header = next(rows, [])
        if header:
            _check_columns(file, header, names)
        for row, values in enumerate(rows):
            if not values:
                continue  # a blank line
            if len(values) != len(header):
                raise DataError(
                    f"{file}, row {row} has {len(values)} fields, and the header {len(header)}; correct it."
                )
            yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{file} is not CSV after row {row} ({error}); put texts with commas or quotes in quotes."
        ) from None
    finally:
        csv.field_size_limit(limit)


def _lines_with_ends(blocks: Iterable[str]) -> Iterator[str]:
    begun: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun) + "\n"
            yield from (f"{line}\n" for line in others[:-1])
            begun = [others[-1]]
    if last := "".join(begun):
        yield last


def _json(file: Path, names: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
    """Yields the records of JSON lines, or of a file that is one list of objects."""
    blocks = text_blocks(file, advance)
    first = next(blocks, "")
    if not first.lstrip().startswith("["):
        yield from (record for _, record in read_records(file, advance))
        return
    parts, size = [], 0
    for block in chain([first], blocks):
        parts.append(block)
        size += len(block)
        if size > MAX_LIST_CHARACTERS:
            raise DataError(
                f"{file} is one list of more than {MAX_LIST_CHARACTERS:,} characters; write one object per line, for "
                f"example with: jq -c '.[]' {file.name}."
            )
    try:
        entries = json.loads("".join(parts), parse_int=float, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno} is not JSON ({error.msg}); correct it.") from None
    except RecursionError:
        raise DataError(f"{file} is nested too deeply; it must be a list of objects with fields.") from None
    for number, entry in enumerate(entries):
        where = f"{file}, row {number}"
        if not isinstance(entry, tuple):
            raise DataError(f"{where} is a JSON {kind_of(entry)}; each must be an object with fields.")
        yield unique_fields(where, entry)


_KINDS: dict[str, Callable[[Path, Sequence[str] | None, Advance], Any]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".jsonl": _json,
    ".csv": _csv,
    ".json": _json,
}
#: Endings that are read, the preferred ones first: folders hold descriptions in JSON beside their data.
TABLE_ENDINGS = tuple(_KINDS)
