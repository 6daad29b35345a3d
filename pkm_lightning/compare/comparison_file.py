"""compare.json: what a comparison is about, so that the same command goes on with it and reports can name arms.

| key | meaning |
|---|---|
| schema | version of this table |
| command, earlier | the command line that wrote it last; others that did before |
| base | overrides of all arms |
| arms | overrides of each arm, its steps included |
| seeds | of the reported runs |
| sweep | learning rates, seeds, `data_seed`, metric; `results` by arm and rate; `chosen` rates by arm. None without |
| seconds | `budget.seconds`, None without it |
| steps_per_second | of each arm, where `budget.seconds` had to know |
| failures | what a process said that ended without finishing its run, by the run's folder within `out` |
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
_ASKED_OF_SWEEP = tuple(field.name for field in fields(SweepSettings))
_FOUND_BY_SWEEP = ("results", "chosen")


@dataclass(kw_only=True)
class Comparison:
    """The content of compare.json; see the module's table."""

    command: list[str]
    base: list[str]
    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    seconds: float | None = None
    steps_per_second: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    earlier: list[list[str]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes it."""
        content = {"schema": SCHEMA, **asdict(self)}
        write_beside(folder / NAME, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def continue_from(self, earlier: Comparison, folder: Path) -> None:
        """Takes up what an earlier command of the same comparison found out; other arms and seeds may join.

        Raises:
            RunDirectoryError: the directory is about something else.
        """
        _refuse(_difference(earlier, self), folder)
        self.earlier = [command for command in (*earlier.earlier, earlier.command) if command != self.command]
        self.arms = dict(earlier.arms)
        self.seeds = sorted({*earlier.seeds, *self.seeds})
        self.failures = dict(earlier.failures)
        self.steps_per_second = {**earlier.steps_per_second, **self.steps_per_second}
        if self.sweep is not None and earlier.sweep is not None:
            self.sweep = {**self.sweep, **{key: earlier.sweep[key] for key in _FOUND_BY_SWEEP}}

    def add_arms(self, arms: Mapping[str, list[str]], folder: Path) -> None:
        """More arms, or the same again.

        Raises:
            RunDirectoryError: one of them was something else before.
        """
        for name in sorted(arms.keys() & self.arms.keys()):
            if arms[name] != self.arms[name]:
                _refuse(f"{name} is {' '.join(self.arms[name])} there, {' '.join(arms[name])} here", folder)
        self.arms = {**self.arms, **arms}

    def add_sweep(self, results: Mapping[str, Any], chosen: Mapping[str, float]) -> None:
        """What a sweep has found for some arms."""
        assert self.sweep is not None
        self.sweep = {
            **self.sweep,
            "results": {**self.sweep["results"], **results},
            "chosen": {**self.sweep["chosen"], **chosen},
        }


def _refuse(what: str, folder: Path) -> None:
    if what:
        raise RunDirectoryError(
            f"out={folder} holds another comparison ({what}); choose another out, say what that one says, or "
            "replace it with resume=never."
        )


def read_comparison(folder: Path) -> Comparison | None:
    """The content of `folder`'s compare.json; None without one.

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
        read = Comparison(**content)
        if not _is_whole(read):
            raise TypeError
        return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunDirectoryError(f"{file} is damaged; remove it, or choose another out.") from None


def _is_whole(read: Comparison) -> bool:
    """Nothing lacks that is read without asking."""
    tables = [read.arms, read.failures]
    if read.sweep is not None:
        if not {*_ASKED_OF_SWEEP, *_FOUND_BY_SWEEP} <= read.sweep.keys():
            return False
        tables += [read.sweep[key] for key in _FOUND_BY_SWEEP]
    return isinstance(read.command, list) and all(isinstance(table, dict) for table in tables)


def _difference(earlier: Comparison, now: Comparison) -> str:
    """What of two comparisons differs that must not, in words; empty if nothing does."""
    base = sorted(set(earlier.base) ^ set(now.base))
    if base:
        return f"{base[0]} is not said by both"
    if earlier.seconds != now.seconds:
        return f"budget.seconds is {earlier.seconds} there, {now.seconds} here"
    left, right = sweep_settings(earlier.sweep), sweep_settings(now.sweep)
    return f"the sweep is {left} there, {right} here" if left != right else ""


def sweep_settings(sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a sweep was asked to do, without what it found."""
    if sweep is None:
        return None
    said = {key: value for key, value in sweep.items() if key not in _FOUND_BY_SWEEP}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
