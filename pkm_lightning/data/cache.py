"""Cache folders that are either complete or absent: built under a lock in a temporary folder, then renamed.

The name is a hash of everything that determines the content. `manifest.json` records these arguments, the sources of
the data and the size of every file, so that a damaged folder is noticed and built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pkm_lightning.errors import DataError
from pkm_lightning.storage import flush

#: Raised by incompatible changes of the files in a cache folder: older folders are then never found.
FORMAT_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One input of a build.

    Attributes:
        name: package or path, for display.
        version: version of the package, or "".
        licence: licence of the data, or "".
        attribution: the sentence that the licence requires, or "".
        files: sha256 of every source file, by name.
    """

    name: str
    version: str = ""
    licence: str = ""
    attribution: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheKey:
    """The arguments that determine the content of a cache folder.

    Attributes:
        kind: the readable part of the folder's name.
        arguments: JSON values; every argument, version and file identity that changes the content.
    """

    kind: str
    arguments: Mapping[str, Any]

    def folder_name(self) -> str:
        """Returns `kind` and 16 digits of the hash."""
        text = json.dumps({"format": FORMAT_VERSION, **self.arguments}, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_cache(root: Path, key: CacheKey, build: Callable[[Path], list[Source]]) -> Path:
    """Returns the folder for `key`, built if it is missing or damaged; any number of processes may call at once.

    Args:
        root: `data.cache_dir`.
        key: the arguments that determine the content.
        build: fills an empty folder and returns its sources.

    Raises:
        DataError: if the cache directory cannot be written.
    """
    folder = root / key.folder_name()
    if _is_complete(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock"):
            # Another process may have built it while this one waited.
            if not _is_complete(folder):
                _build(folder, key, build)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={root} cannot be written ({error.strerror or error}: {error.filename or root}); free "
            "space there, or set data.cache_dir or the environment variable PKM_LIGHTNING_CACHE to another directory."
        ) from error
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a complete cache folder."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _is_complete(folder: Path) -> bool:
    try:
        files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError):
        return False  # absent, not JSON, or a manifest of something else


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, key: CacheKey, build: Callable[[Path], list[Source]]) -> None:
    if folder.exists():
        log.warning("The cache folder %s is damaged and is built again.", folder)
    # The lock is held, so a folder of this name was left by a build that was killed.
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    sources = build(part)
    _write_manifest(part, key, sources)
    # On disk before the rename: after a loss of power the name must not stand for files without content.
    for path in [*part.iterdir(), part]:
        flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    flush(folder.parent)
    for source in sources:
        if source.attribution:
            log.info("Data: %s (%s).", source.attribution, source.licence)


def _write_manifest(folder: Path, key: CacheKey, sources: list[Source]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT_VERSION,
        "kind": key.kind,
        "arguments": dict(key.arguments),
        "sources": [asdict(source) for source in sources],
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
