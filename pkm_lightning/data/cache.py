"""Cache folders that are either complete or absent: built under a lock in a temporary folder, then renamed.

The name is a hash of everything that determines the content. `manifest.json` records these arguments, the sources of
the data, and size and sha256 of every file. Every file is read and compared when a folder is opened, about 1 s per GB,
so that a flipped bit is noticed; a damaged folder is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache_lock import cache_lock
from pkm_lightning.data.heartbeat import Heartbeat
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
        DataError: if the cache directory cannot be written; names the damaged file if there is one.
    """
    folder = root / key.folder_name()
    damage = find_damage(folder, key)
    if damage is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache_lock(root / f".{folder.name}.lock"):
            # Another process may have built it while this one waited.
            damage = find_damage(folder, key)
            if damage is not None:
                _build(folder, key, build, damage)
    except OSError as error:
        if error.filename and not _touches(Path(error.filename), root):
            raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error
        damaged = f" {folder} is damaged: {damage}." if damage and folder.exists() else ""
        raise DataError(
            f"data.cache_dir={root} cannot be written ({error.strerror or error}: {error.filename or root}); free "
            "space there, or set data.cache_dir or the environment variable PKM_LIGHTNING_CACHE to another directory."
            f"{damaged}"
        ) from error
    return folder


def _touches(path: Path, root: Path) -> bool:
    """Returns whether `path` is `root`, lies in it, or is a directory above it."""
    return path == root or root in path.parents or path in root.parents


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a complete cache folder."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def find_damage(folder: Path, key: CacheKey | None) -> str | None:
    """Returns what is wrong with a cache folder, such as `train.bin has changed since it was written`, or None.

    Reads all files; where that takes long, a line is logged now and then. A `key` of None stands for any.
    """
    if not folder.exists():
        return "it is missing"
    try:
        manifest = read_manifest(folder)
        seal = manifest.pop("sha256", None)
        # Folders of earlier versions have no seal.
        whole = seal in (None, _seal(manifest))
        if key is not None:
            whole &= manifest["arguments"] == json.loads(json.dumps(key.arguments))
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        read = whole and isinstance(manifest["sources"], list)
    except OSError as error:
        return f"manifest.json cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        read = False  # not JSON, or JSON of another shape
    if not read:
        return "manifest.json has changed since it was written"
    heartbeat = Heartbeat()
    for name, (size, sha256) in entries.items():
        if heartbeat.is_due():
            log.info("compares the prepared data in %s with their hashes, %.0f s so far", folder, heartbeat.seconds)
        try:
            if (folder / name).stat().st_size != size:
                return f"{name} has another size than was written"
            if sha256_file(folder / name) != sha256:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _build(folder: Path, key: CacheKey, build: Callable[[Path], list[Source]], damage: str) -> None:
    if folder.exists():
        log.warning("The cache folder %s is damaged (%s) and is built again.", folder, damage)
    # The lock is held, so a folder of this name was left by a build that was killed.
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        sources = build(part)
        _write_manifest(part, key, sources)
        # On disk before the rename: after a loss of power the name must not stand for files without content.
        for path in [*part.iterdir(), part]:
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
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
    manifest["sha256"] = _seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")


def _seal(manifest: Mapping[str, Any]) -> str:
    """Returns the sha256 of the content of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
