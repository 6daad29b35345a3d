"""Prepares the data of a run ahead of it: into the cache where the run looks for them, or into a user's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import MANIFEST, CacheKey, Source, complete_folder, open_cache, read_manifest
from pkm_lightning.data.datamodule import TokenDataModule
from pkm_lightning.data.shards.format import INDEX
from pkm_lightning.errors import ConfigError


def prepare_data(data: TokenDataModule, name: str, out: Path | None, *, overwrite: bool) -> tuple[Path, bool]:
    """Returns the folder of the prepared data, and whether they were built now; compares all files if not.

    Args:
        data: whose `build` is called.
        name: of the data in messages, such as `text`.
        out: the folder; None for the one in `data.cache_dir` that a run looks for.
        overwrite: whether other prepared data in `out` are replaced.

    Raises:
        ConfigError: `out` holds something else, or the data are of a kind that only the cache holds.
        DataError: as `build`; or the folder cannot be written.
    """
    key = data.cache_key()
    is_new = False

    def build(folder: Path) -> list[Source]:
        nonlocal is_new
        if out is not None:  # once more: another process may have written it while this one waited
            check_out(out, key, overwrite=overwrite)
        is_new = True
        return data.build(folder)

    if out is None:
        folder = open_cache(data.usable_cache_dir(), key, build, resumes=data.resumes_build, whole=True)
        return folder, is_new
    if not data.resumes_build:
        raise ConfigError(f"data={name} is prepared into data.cache_dir alone; leave out=... away.")
    check_out(out, key, overwrite=overwrite)
    remedy = "free space there, or give another folder"
    folder = complete_folder(out, key, build, place=f"out={out}", remedy=remedy, resumes=True, whole=True)
    return folder, is_new


def check_out(out: Path, key: CacheKey, *, overwrite: bool) -> None:
    """Refuses a folder that holds anything but prepared data, or other ones than `key` unless `overwrite`.

    Raises:
        ConfigError: naming what is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder.")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    try:
        manifest = read_manifest(out)
        known, arguments = {*manifest["files"], MANIFEST}, manifest["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        known, arguments = set(), {}
    others = sorted(names - known)
    if INDEX not in known or others:
        shown = ", ".join([*others[:3], *(["..."] if len(others) > 3 else [])])
        raise ConfigError(
            f"out={out} holds {shown}, which is not of prepared data; give a new folder, or an empty one."
        )
    difference = describe_difference(arguments, key.arguments)
    if difference and not overwrite:
        raise ConfigError(f"out={out} holds other data: {difference}; give another folder, or overwrite=true.")


def describe_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns the first difference between the arguments of prepared data and those of a command; "" for none."""
    for name in {**there, **here}:
        before, now = there.get(name), here.get(name)
        if before == now:
            continue
        if not name.endswith(" files"):
            return f"{name} is {_shown(before)} there, and {_shown(now)} now"
        states, states_now = ({entry[0]: entry[1:] for entry in entries or []} for entries in (before, now))
        for path in {**states, **states_now}:
            if states.get(path) != states_now.get(path):
                change = "is new" if path not in states else "is left out" if path not in states_now else "has changed"
                return f"{path} {change}"
        return "the order of the files has changed"
    return ""


def _shown(value: Any) -> str:
    """Returns a value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)
