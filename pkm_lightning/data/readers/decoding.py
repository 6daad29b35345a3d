"""The characters of UTF-8 files, plain or compressed, a block at a time: memory never holds a file.

Every error names the file and, where there is one, the byte within its text.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from pkm_lightning.data.files import COMPRESSED
from pkm_lightning.errors import DataError, missing_extra
from pkm_lightning.storage import open_regular

__all__ = ["Advance", "ignore", "text_blocks"]

BLOCK_BYTES = 2**20
#: Compressed bytes that zstandard takes at once: a malicious file makes 32,000 times as many of them.
ZSTD_BYTES = 2**12

#: How files begin that are given for text by mistake.
_BEGINNINGS = {
    b"\x1f\x8b": "a gzip file; name it .gz",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; name it .zst",
    b"BZh": "a bzip2 file; compress it with gzip or zstd",
    b"\xfd7zXZ": "an xz file; compress it with gzip or zstd",
    b"PK\x03\x04": "a zip file; unpack it",
    b"PAR1": "a Parquet file; read it with data=hf",
    b"ARROW1": "an Arrow file; read it with data=hf",
    b"%PDF": "a PDF file; extract its text",
}


#: Takes the bytes of a file, as it lies on disk, that have been read.
Advance = Callable[[int], None]


def ignore(position: int) -> None:
    """Takes a position that nobody asked for."""


def text_blocks(file: Path, advance: Advance = ignore) -> Iterator[str]:
    """Yields the text of a file in blocks of about a megabyte, without a byte order mark.

    Args:
        file: to be read.
        advance: takes the position in the file before each block.

    Raises:
        DataError: it cannot be read or decompressed, or is not UTF-8; names the byte offset in the text.
        ConfigError: it is a .zst file, and zstandard is not installed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes = 0
    beginning, is_first = b"", True
    for block in chain(_bytes_of(file, advance), [b""]):
        waiting = len(decoder.getstate()[0])
        beginning = beginning or block[:8]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, n_bytes - waiting + error.start, beginning) from None
        n_bytes += len(block)
        if text:
            # Some editors write a byte order mark.
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False


def _not_utf8(file: Path, place: int, beginning: bytes) -> DataError:
    kind = next((kind for start, kind in _BEGINNINGS.items() if beginning.startswith(start)), None)
    return DataError(
        f"{file} is not UTF-8 at byte {place}{' of its text' if file.suffix in COMPRESSED else ''}; "
        f"{'convert it, for example with iconv' if kind is None else f'it begins as {kind}'}."
    )


def _bytes_of(file: Path, advance: Advance) -> Iterator[bytes]:
    """Yields the decompressed content of a file in blocks that are not empty."""
    try:
        if file.suffix == ".zst":
            yield from _zstd(file, advance)
            return
        with open_regular(file, "rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            while block := stream.read(BLOCK_BYTES):
                advance(raw.tell())
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = "ends in the middle" if isinstance(error, EOFError) else f"is damaged ({error})"
        raise DataError(f"{file} {problem}; check it with gzip -t, and copy or compress it again.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check data.path and the permissions.") from error


def _zstd(file: Path, advance: Advance) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise missing_extra(str(file), "zstandard", "data") from None
    remedy = "check it with zstd -t, and copy or compress it again"
    # Frame by frame: readers of the whole stream take a file that ends in the middle for a complete one.
    frame, is_open = zstandard.ZstdDecompressor().decompressobj(), False
    with open_regular(file, "rb") as raw:
        while data := raw.read(ZSTD_BYTES):
            while data:
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise DataError(f"{file} is damaged ({error}); {remedy}.") from None
                if block:
                    advance(raw.tell())
                    yield block
                is_open, data = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if is_open:
        raise DataError(f"{file} ends in the middle; {remedy}.")
