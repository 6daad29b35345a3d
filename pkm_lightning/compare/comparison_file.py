"""compare.json: what a comparison is about, so that the same command continues it and reports can name its variants.

| key | meaning |
|---|---|
| schema | version of this table |
| command, earlier | the command line that wrote the file last; different ones that wrote it before |
| base | overrides of all variants |
| arms | overrides of each variant, its number of steps included |
| seeds | seeds of the reported runs |
| sweep | learning rates, seeds, `data_seed`, metric; `results` by variant and rate; `chosen` rates; null without |
| seconds | `budget.seconds`, null without it |
| steps_per_second | speed of each variant, measured for `budget.seconds` |
| failures | last output of each process that ended without finishing its run, by the run's folder within `out` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import write_beside

NAME = "compare.json"
SCHEMA = 1
# Keys in the file by attribute, where they differ. Changing them would orphan the comparisons that are on disk.
_FILE_KEYS = {"variants": "arms"}
_SWEEP_SETTINGS = tuple(field.name for field in fields(SweepSettings))
_SWEEP_RESULTS = ("results", "chosen")


@dataclass(kw_only=True)
class Comparison:
    """The content of compare.json; see the module's table."""

    command: list[str]
    base: list[str]
    variants: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    seconds: float | None = None
    steps_per_second: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    earlier: list[list[str]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the file into `folder`."""
        content = {_FILE_KEYS.get(name, name): value for name, value in asdict(self).items()}
        write_beside(folder / NAME, json.dumps({"schema": SCHEMA, **content}, indent=2, allow_nan=False) + "\n")

    def continue_from(self, earlier: Comparison, folder: Path) -> None:
        """Adopts the results of an earlier command of the same comparison; variants and seeds may be added.

        Raises:
            RunDirectoryError: the directory holds another comparison.
        """
        _refuse(_difference(earlier, self), folder)
        self.earlier = [command for command in (*earlier.earlier, earlier.command) if command != self.command]
        self.variants = dict(earlier.variants)
        self.seeds = sorted({*earlier.seeds, *self.seeds})
        self.failures = dict(earlier.failures)
        self.steps_per_second = {**earlier.steps_per_second, **self.steps_per_second}
        if self.sweep is not None and earlier.sweep is not None:
            self.sweep = {**self.sweep, **{key: earlier.sweep[key] for key in _SWEEP_RESULTS}}

    def add_variants(self, variants: Mapping[str, list[str]], folder: Path) -> None:
        """Adds variants; those that are there already must have the same overrides.

        Raises:
            RunDirectoryError: one of them had other overrides before.
        """
        for name in sorted(variants.keys() & self.variants.keys()):
            if variants[name] != self.variants[name]:
                there, here = " ".join(self.variants[name]), " ".join(variants[name])
                _refuse(f"{name} is {there} there, {here} here", folder)
        self.variants = {**self.variants, **variants}

    def add_sweep(self, results: Mapping[str, Any], chosen: Mapping[str, float]) -> None:
        """Adds the results of a sweep for some variants."""
        assert self.sweep is not None
        self.sweep = {
            **self.sweep,
            "results": {**self.sweep["results"], **results},
            "chosen": {**self.sweep["chosen"], **chosen},
        }


def _refuse(difference: str, folder: Path) -> None:
    if difference:
        raise RunDirectoryError(
            f"out={folder} holds another comparison ({difference}); choose another out, repeat the overrides of that "
            "comparison, or replace it with resume=never."
        )


def read_comparison(folder: Path) -> Comparison | None:
    """Returns the content of `folder`'s compare.json, or None if there is no such file.

    Raises:
        RunDirectoryError: it cannot be read.
    """
    file = folder / NAME
    if not file.exists():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        schema = content.pop("schema")
        if schema != SCHEMA:
            raise RunDirectoryError(f"{file} has schema {schema}; this version reads {SCHEMA}.")
        attributes = {key: name for name, key in _FILE_KEYS.items()}
        comparison = Comparison(**{attributes.get(key, key): value for key, value in content.items()})
        if not _is_whole(comparison):
            raise TypeError
        return comparison
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunDirectoryError(f"{file} is damaged; remove it, or choose another out.") from None


def _is_whole(comparison: Comparison) -> bool:
    """Returns whether everything is there that is used without a further check."""
    tables = [comparison.variants, comparison.failures]
    if comparison.sweep is not None:
        if not {*_SWEEP_SETTINGS, *_SWEEP_RESULTS} <= comparison.sweep.keys():
            return False
        tables += [comparison.sweep[key] for key in _SWEEP_RESULTS]
    return isinstance(comparison.command, list) and all(isinstance(table, dict) for table in tables)


def _difference(earlier: Comparison, now: Comparison) -> str:
    """Describes a difference that rules out continuing; returns an empty string if there is none."""
    base = sorted(set(earlier.base) ^ set(now.base))
    if base:
        return f"{base[0]} is set by one of the two commands only"
    if earlier.seconds != now.seconds:
        return f"budget.seconds is {earlier.seconds} there, {now.seconds} here"
    there, here = sweep_settings(earlier.sweep), sweep_settings(now.sweep)
    return f"the sweep is {there} there, {here} here" if there != here else ""


def sweep_settings(sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns a sweep's settings without its results."""
    if sweep is None:
        return None
    settings = {key: value for key, value in sweep.items() if key not in _SWEEP_RESULTS}
    # JSON has no tuples: what was read back has lists.
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
