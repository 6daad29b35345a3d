"""compare.json: what a comparison is about, so that the same command continues it and reports can name its variants.

| key | meaning |
|---|---|
| schema | version of this table |
| command, earlier | the command line that wrote the file last; different ones that wrote it before |
| base | overrides of all variants |
| arms | overrides of each variant, its number of steps included |
| seeds | seeds of the reported runs |
| sweep | learning rates, seeds, `draw`, metric; `results` by variant and rate; `chosen` rates; null without [1] |
| seconds | `budget.seconds`, null without it |
| steps_per_second | speed of each variant, measured for `budget.seconds` |
| failures | last output of each process that ended without finishing its run, by the run's folder within `out` |

[1] Earlier versions chose by the test of runs with another `data.seed`: they have `data_seed`, added to it, for `draw`.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pkm_lightning.compare.settings import SweepSettings
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import open_regular, write_beside

NAME = "compare.json"
SCHEMA = 1
# Keys in the file by attribute, where they differ. Changing them would orphan the comparisons that are on disk.
_FILE_KEYS = {"variants": "arms"}
#: Of a sweep in the file, beside the fields of `SweepSettings`.
_SWEEP_RESULTS = {"results": dict[str, dict[str, float | None]], "chosen": dict[str, float]}


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
        RunDirectoryError: it is damaged, or of a newer version.
    """
    file = folder / NAME
    if not file.exists():
        return None
    try:
        with open_regular(file, encoding="utf-8") as opened:
            content: Any = json.load(opened)
        schema = content.pop("schema")
        attributes = {key: name for name, key in _FILE_KEYS.items()}
        named = {attributes.get(key, key): value for key, value in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(file, "it is no JSON object with a schema") from None
    if type(schema) is int and schema > SCHEMA:
        raise RunDirectoryError(
            f"{file} was written by a newer version of this package: it has schema {schema}, this one reads {SCHEMA}; "
            "use that version, or choose another out."
        )
    if type(schema) is not int or schema != SCHEMA:
        raise _damaged(file, f"it has schema {str(schema)[:40]}")
    _check_types(file, named)
    return Comparison(**named)


def _damaged(file: Path, reason: str) -> RunDirectoryError:
    return RunDirectoryError(f"{file} is damaged ({reason}); remove it, or choose another out.")


def _check_types(file: Path, named: Mapping[str, Any]) -> None:
    """Refuses content that differs from the annotations of `Comparison`, and paths out of the comparison's directory.

    Raises:
        RunDirectoryError: naming the key.
    """
    hints, required = get_type_hints(Comparison), ("command", "base")
    wrong = [key for key in required if key not in named]
    wrong += [key for key, value in named.items() if key not in hints or not _is_a(value, hints[key])]
    sweep = named.get("sweep")
    if not wrong and sweep is not None:
        parts = {**get_type_hints(SweepSettings), **_SWEEP_RESULTS}
        if "data_seed" in sweep:
            parts["data_seed"] = parts.pop("draw")
        wrong = [f"sweep.{key}" for key, type_ in parts.items() if key not in sweep or not _is_a(sweep[key], type_)]
    if wrong:
        raise _damaged(file, f"{_FILE_KEYS.get(wrong[0], wrong[0])} is missing, unknown or of another kind")
    outside = [run for run in named.get("failures", {}) if Path(run).is_absolute() or ".." in Path(run).parts]
    if outside:
        raise _damaged(file, f"failures names {outside[0]}, which is no run of this comparison")


def _is_a(value: Any, annotation: Any) -> bool:
    """Returns whether a value that JSON can hold fits a type annotation; its lists stand for tuples, too."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is types.UnionType:
        return any(_is_a(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, arguments[1]) for item in value.values())
    if annotation is float:
        return type(value) in (int, float) and -1e308 < value < 1e308  # nor infinite, nor an integer beyond floats
    return annotation is Any or type(value) is annotation


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
