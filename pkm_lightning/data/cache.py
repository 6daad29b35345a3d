"""Cache folders that are either complete or absent: built under a lock in a temporary folder, then renamed.

The name is a hash of everything that determines the content. `manifest.json` records these arguments, the sources of
the data, and size and sha256 of every file. Up to 4 GB are read and compared when a folder is opened, about 1 s per GB,
so that a flipped bit is noticed; a damaged folder is built again. The temporary folder of a build that was killed is
removed, or continued by a build that can; one that nobody continues for two weeks is removed by the next build.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import shutil
import time
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
MANIFEST = "manifest.json"
#: How far a build that resumes has come; its `sha256` are hashes that were computed while the files were written.
PROGRESS = "progress.json"
#: Of more data than these only the sizes of the files are compared when a run starts.
VERIFIED_BYTES = 4_000_000_000
#: Until then a build that was interrupted can be continued, also where other data are prepared in between.
ABANDONED_SECONDS = 14 * 24 * 3600

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

    @property
    def digest(self) -> str:
        """The hash of the arguments."""
        text = json.dumps({"format": FORMAT_VERSION, **self.arguments}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def folder_name(self) -> str:
        """Returns `kind` and 16 digits of the hash."""
        return f"{self.kind}-{self.digest[:16]}"


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_cache(
    root: Path, key: CacheKey, build: Callable[[Path], list[Source]], *, resumes: bool = False, whole: bool = False
) -> Path:
    """Returns the folder for `key`, built if it is missing or damaged; any number of processes may call at once.

    Args:
        root: `data.cache_dir`.
        key: the arguments that determine the content.
        build: fills an empty folder and returns its sources.
        resumes: whether `build` continues in a folder that a killed call of it has left.
        whole: compares all files with their hashes, however large they are.

    Raises:
        DataError: if the cache directory cannot be written; names the damaged file if there is one.
    """
    remedy = (
        "free space there, or set data.cache_dir or the environment variable PKM_LIGHTNING_CACHE to another directory"
    )
    folder = root / key.folder_name()

    def build_and_tidy(part: Path) -> list[Source]:
        sources = build(part)
        _remove_abandoned(root)
        return sources

    return complete_folder(
        folder, key, build_and_tidy, place=f"data.cache_dir={root}", remedy=remedy, resumes=resumes, whole=whole
    )


def complete_folder(
    folder: Path,
    key: CacheKey,
    build: Callable[[Path], list[Source]],
    *,
    place: str,
    remedy: str,
    resumes: bool,
    whole: bool,
) -> Path:
    """Returns `folder` with the content for `key`, as `open_cache` does.

    Args:
        folder: what it holds otherwise is replaced.
        key, build, resumes, whole: see `open_cache`.
        place: the key and directory where it lies, for messages.
        remedy: what to do where that cannot be written, for messages.

    Raises:
        DataError: the place cannot be written, or something that `build` reads cannot be read.
    """
    root = folder.parent
    damage = find_damage(folder, key, whole=whole)
    if damage is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with cache_lock(root / f".{folder.name}.lock"):
            # Another process may have built it while this one waited.
            damage = find_damage(folder, key, whole=whole)
            if damage is not None:
                _build(folder, key, build, damage, resumes=resumes)
    except OSError as error:
        if error.filename and not _touches(Path(error.filename), root):
            raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error
        damaged = f" {folder} is damaged: {damage}." if damage and folder.exists() else ""
        kept = (
            " What was prepared is kept, and the same command continues with it." if _part(folder, key).exists() else ""
        )
        raise DataError(
            f"{place} cannot be written ({error.strerror or error}: {error.filename or root}); {remedy}.{kept}{damaged}"
        ) from error
    return folder


def _touches(path: Path, root: Path) -> bool:
    """Returns whether `path` is `root`, lies in it, or is a directory above it."""
    return path == root or root in path.parents or path in root.parents


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a complete cache folder."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def find_damage(folder: Path, key: CacheKey | None, *, whole: bool = False) -> str | None:
    """Returns what is wrong with a cache folder, such as `train.bin has changed since it was written`, or None.

    Reads all files; where that takes long, a line is logged now and then. Of files of more than 4 GB together only the
    sizes are compared, unless `whole`. A `key` of None stands for any.
    """
    if not folder.exists():
        return "it is missing"
    try:
        manifest = read_manifest(folder)
        seal = manifest.pop("sha256", None)
        # Folders of earlier versions have no seal.
        is_intact = seal in (None, _seal(manifest))
        if key is not None:
            is_intact &= manifest["arguments"] == json.loads(json.dumps(key.arguments))
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        read = is_intact and isinstance(manifest["sources"], list)
    except OSError as error:
        return f"manifest.json cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        read = False  # not JSON, or JSON of another shape
    if not read:
        return "manifest.json has changed since it was written"
    heartbeat = Heartbeat()
    total = sum(size for size, _ in entries.values())
    by_content = whole or total <= VERIFIED_BYTES
    if not by_content:
        log.info("%s: %.1f GB, of which only the sizes are compared; prepare compares the content", folder, total / 1e9)
    for name, (size, sha256) in entries.items():
        if heartbeat.is_due():
            log.info("compares the prepared data in %s with their hashes, %.0f s so far", folder, heartbeat.seconds)
        try:
            if (folder / name).stat().st_size != size:
                return f"{name} has another size than was written"
            if by_content and sha256_file(folder / name) != sha256:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _part(folder: Path, key: CacheKey) -> Path:
    """Returns the folder in which the content for `key` is built."""
    return folder.with_name(f".{folder.name}.{key.digest[:8]}.part")


def _build(folder: Path, key: CacheKey, build: Callable[[Path], list[Source]], damage: str, *, resumes: bool) -> None:
    if folder.exists() and any(folder.iterdir()):
        log.warning("The cache folder %s is damaged (%s) and is built again.", folder, damage)
    part = _part(folder, key)
    # The lock is held, so folders of such names were left by builds that were killed.
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        if not (resumes and left == part):
            shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(exist_ok=True)
        sources = build(part)
        _write_manifest(part, key, sources)
        # On disk before the rename: after a loss of power the name must not stand for files without content.
        for path in [*part.iterdir(), part]:
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except BaseException as error:
        # What was interrupted, or filled the disk, goes on where it was; bad input fails again.
        if not resumes or (isinstance(error, Exception) and not isinstance(error, OSError)):
            shutil.rmtree(part, ignore_errors=True)
        raise
    flush(folder.parent)
    for source in sources:
        if source.attribution:
            log.info("Data: %s (%s).", source.attribution, source.licence)


def _remove_abandoned(root: Path) -> None:
    """Removes what killed builds of other data have left long ago: text that has been edited since, for example."""
    for part in root.glob(".*.part"):
        # `.NAME.DIGEST.part`, see `_part`
        lock = part.with_name(f"{part.stem.rpartition('.')[0]}.lock")
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS and lock.exists():
                with cache_lock(lock, waits=False):
                    shutil.rmtree(part)
                    log.info("removed %s, which no command has continued for a long time", part)


def _write_manifest(folder: Path, key: CacheKey, sources: list[Source]) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # of a build that was killed before its folder was renamed
    known = _hashes_of_build(folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name != PROGRESS
    }
    manifest = {
        "format": FORMAT_VERSION,
        "kind": key.kind,
        "arguments": dict(key.arguments),
        "sources": [asdict(source) for source in sources],
        "files": files,
    }
    manifest["sha256"] = _seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    (folder / PROGRESS).unlink(missing_ok=True)


def _hashes_of_build(folder: Path) -> dict[str, str]:
    """Returns the hashes that a build has computed while it wrote."""
    try:
        hashes: dict[str, str] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return {}
    return hashes


def _seal(manifest: Mapping[str, Any]) -> str:
    """Returns the sha256 of the content of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
