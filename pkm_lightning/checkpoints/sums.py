"""CRC-32 sums, by which a value that has changed on disk is noticed.

| kind | sums |
|---|---|
| archive of `torch.save` | torch stores one for each record in the archive's directory, and does not check it |
| `.metadata` of a folder | follows the pickle, as `crc32 XXXXXXXX` and a line feed |
| exported file | `pkm_lightning_crc32` in its header; see `pkm_lightning.checkpoints.safetensors` |

They protect from disks and networks, not from people: whoever changes a file on purpose can change the sum as well.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeVar, cast

from pkm_lightning.checkpoints.mapped import DamagedFileError, FilePart, MappedFile

T = TypeVar("T")
_BLOCK_BYTES = 64 * 2**20
_SEAL = re.compile(rb"crc32 ([0-9a-f]{8})\n")
_SEAL_BYTES = 15
#: Of a record in an archive: the lengths of the name and of the extra field that precede its bytes.
_LOCAL_HEADER = struct.Struct("<26xHH")


def crc32(file: MappedFile, start: int, length: int) -> int:
    """Returns the sum of `length` bytes from `start` on, and releases the memory of the pages that it reads."""
    crc = 0
    for first in range(start, start + length, _BLOCK_BYTES):
        with file.view(first, min(_BLOCK_BYTES, start + length - first)) as block:
            crc = zlib.crc32(block, crc)
        file.forget()
    return crc


class Share(NamedTuple):
    """What one of `ranks` ranks that check a checkpoint together reads: every `ranks`-th record, from `rank` on."""

    rank: int = 0
    ranks: int = 1

    def of(self, records: Sequence[T]) -> Sequence[T]:
        """Returns the records that this rank reads."""
        return records[self.rank :: self.ranks]


ALL = Share()


def check_archive(file: MappedFile, start: int, length: int, names: Mapping[int, str], share: Share = ALL) -> None:
    """Compares the records of an archive, which lies in `length` bytes from `start` on, to their stored sums.

    Args:
        file, start, length: where the archive lies.
        names: of the records that hold tensors, by their first byte; one with an empty name is not read.
        share: of the records.

    Raises:
        DamagedFileError: a record differs, or the directory is unreadable; names the record.
    """
    for record in share.of(_directory(file, start, length)):
        first = _first_byte(file, start + record.header_offset)
        name = names.get(first, record.filename)
        if name:
            _check_record(file, first, start + length, record, name)


def check_skeleton(file: MappedFile) -> None:
    """Compares the records of an archive that hold no values of tensors to their stored sums, as `check_archive` does.

    Raises:
        DamagedFileError: as `check_archive`.
    """
    for record in _directory(file, 0, len(file)):
        if "/data/" not in record.filename:
            _check_record(file, _first_byte(file, record.header_offset), len(file), record, record.filename)


def _directory(file: MappedFile, start: int, length: int) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(cast("IO[bytes]", FilePart(file, start, length))) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise DamagedFileError("its directory is unreadable") from None
    # Records that overlap could make a small file take hours.
    if sum(record.file_size for record in records) > length:
        raise DamagedFileError("its records are longer than the archive")
    return records


def _check_record(file: MappedFile, first: int, end: int, record: zipfile.ZipInfo, name: str) -> None:
    fits = record.compress_type == zipfile.ZIP_STORED and first + record.file_size <= end
    if not fits or crc32(file, first, record.file_size) != record.CRC:
        raise DamagedFileError(f"{name} has changed since it was written")


def _first_byte(file: MappedFile, header: int) -> int:
    """Returns where the bytes of the record whose local header lies at `header` start."""
    lengths = file.read(header, _LOCAL_HEADER.size)
    if len(lengths) < _LOCAL_HEADER.size:
        raise DamagedFileError("its directory is unreadable")
    return header + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(lengths))


def seal(path: Path) -> None:
    """Appends the sum of a file's content to the file."""
    crc = zlib.crc32(path.read_bytes())
    with path.open("ab") as file:
        file.write(b"crc32 %08x\n" % crc)


def unsealed(raw: bytes, name: str) -> bytes:
    """Returns the content of a file without the sum that `seal` appended, if it has one.

    Raises:
        DamagedFileError: the content differs from the sum; `name` is that of the file.
    """
    stored = _SEAL.fullmatch(raw[-_SEAL_BYTES:])
    if stored is None:
        return raw
    content = raw[:-_SEAL_BYTES]
    if zlib.crc32(content) != int(stored[1], 16):
        raise DamagedFileError(f"{name} has changed since it was written")
    return content
