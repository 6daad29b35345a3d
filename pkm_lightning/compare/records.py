"""Runs found under directories and read back, with their variants and the reasons of failures. No model is needed."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from pkm_lightning.compare.comparison_file import NAME as COMPARISON_FILE
from pkm_lightning.compare.comparison_file import Comparison, read_comparison
from pkm_lightning.compare.leaves import leaves, portable_leaves
from pkm_lightning.compare.run_files import Answers, read_answers, read_config, read_metrics
from pkm_lightning.compare.run_state import is_held, read_record
from pkm_lightning.errors import RunDirectoryError

#: `Run.failure` of a run that a process is still working on.
STILL_RUNNING = "still running"
_SEED_FOLDER = re.compile(r"seed-\d+")
# Folders of a comparison whose runs are not reported.
_NOT_REPORTED = ("sweep", "speed")
# Numbers that every report of a finished run needs.
_NEEDED = (
    "model.dim",
    "model.n_layers",
    "optim.lr",
    "run.json params.total",
    "run.json tokens",
    "run.json seconds.train",
)
# Keys of run.json whose values are numbers or null, or mappings of such at any depth.
_NUMBERS = (
    *("tokens", "tokens_per_second", "peak_memory_bytes", "facts", "world_size", "threads"),
    *("params", "flops_per_token", "bytes_per_token", "seconds", "throughput", "best_validation", "metrics"),
)
# Keys of run.json whose values are mappings or null.
_NESTED = (
    "params",
    "flops_per_token",
    "bytes_per_token",
    "seconds",
    "throughput",
    "best_validation",
    "metrics",
    "versions",
)
# Keys of config.yaml whose values are mappings.
_GROUPS = ("model", "ffn", "data", "optim", "trainer")
# Largest difference between two means of the same answers.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as reports see it.

    Args:
        folder: its directory.
        variant: name of the variant that it belongs to.
        seed: its seed.
        config: content of config.yaml.
        record: content of run.json.
        rows: rows of metrics.csv; an empty field has no key.
        answers: answers of the test by form; empty for data without questions.
        failure: why it has no results; empty if it finished.
    """

    folder: Path
    variant: str
    seed: int
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[dict[str, float]]
    answers: dict[str, Answers]
    failure: str

    @property
    def ok(self) -> bool:
        """The run finished with finite metrics."""
        return not self.failure

    @property
    def is_dense(self) -> bool:
        """The run's FFN is the model's base FFN alone: the dense reference of variants that replace that FFN."""
        ffn, base_ffn = self.config.get("ffn"), (self.config.get("model") or {}).get("base_ffn")
        if not isinstance(ffn, Mapping) or not isinstance(base_ffn, Mapping) or self.config.get("extra_ffns"):
            return False
        return _class_name(ffn) == _class_name(base_ffn)


def _class_name(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_")).rsplit(".", 1)[-1]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Comparison]]:
    """Reads all runs under `folders`, each once, and the comparisons that they belong to.

    A run in NAME/seed-N belongs to the variant NAME; others are named after their FFN and, if more is needed, after the
    keys in which they differ.

    Raises:
        RunDirectoryError: a folder does not exist or holds no run, or two different runs have one variant and seed.
    """
    comparisons, locations = _locate(folders)
    reported = {run: root for run, root in locations.items() if _part(run, root) not in _NOT_REPORTED}
    runs = _named([_read(run, root, comparisons.get(root) if root else None) for run, root in reported.items()])
    runs = _without_duplicates(runs)
    order = [variant for comparison in comparisons.values() for variant in comparison.variants]
    rank = {variant: i for i, variant in enumerate(dict.fromkeys([*order, *(run.variant for run in runs)]))}
    return sorted(runs, key=lambda run: (rank[run.variant], run.seed)), list(comparisons.values())


def read_swept(folders: Sequence[Path]) -> list[Run]:
    """Reads the runs of the learning-rate sweeps of the comparisons in `folders`, with their variants.

    Raises:
        RunDirectoryError: as `read_runs` does.
    """
    comparisons, locations = _locate(folders)
    swept = [(run, root) for run, root in locations.items() if root and _part(run, root) == "sweep"]
    return [replace(_read(run, root, comparisons[root]), variant=run.relative_to(root).parts[1]) for run, root in swept]


def _locate(folders: Sequence[Path]) -> tuple[dict[Path, Comparison], dict[Path, Path | None]]:
    """Returns comparisons by directory, and run directories with that of their comparison, or None.

    Runs that a comparison lists as failed are included, even if they never had a directory.
    """
    comparisons: dict[Path, Comparison] = {}
    locations: dict[Path, Path | None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunDirectoryError(f"runs: {folder} is not a directory.")
        around = [parent / COMPARISON_FILE for parent in folder.resolve().parents]
        for file in (*filter(Path.exists, around), *sorted(folder.rglob(COMPARISON_FILE))):
            comparison = read_comparison(file.parent)
            assert comparison is not None
            comparisons.setdefault(file.parent.resolve(), comparison)
        started = [file.parent.resolve() for file in sorted(folder.rglob("run.json"))]
        failed = [
            root / path
            for root, comparison in comparisons.items()
            for path in comparison.failures
            if root.is_relative_to(folder.resolve())
        ]
        runs = {run: _root(run, comparisons) for run in (*started, *failed)}
        if all(_part(run, root) in _NOT_REPORTED for run, root in runs.items()):
            except_sweeps = " except those of a sweep" if runs else ""
            raise RunDirectoryError(f"runs: {folder} holds no record of a run (run.json){except_sweeps}.")
        locations.update(runs)
    return comparisons, locations


def _root(run: Path, comparisons: Iterable[Path]) -> Path | None:
    """Returns the directory of the innermost comparison around a run, or None."""
    roots = (root for root in comparisons if run.is_relative_to(root))
    return max(roots, key=lambda root: len(root.parts), default=None)


def _part(run: Path, root: Path | None) -> str:
    """Returns the folder of its comparison that holds a run; empty without a comparison."""
    return run.relative_to(root).parts[0] if root else ""


def _read(folder: Path, root: Path | None, comparison: Comparison | None) -> Run:
    """Reads one run; damaged files make the run a failed one and do not stop the report."""
    stored, config = read_record(folder), read_config(folder)
    record = {key: value for key, value in stored.items() if _is_sound(key, value)}
    seed = record.get("seed")
    failure = next((f"its files are damaged (run.json: {key})" for key in stored if key not in record), "")
    if any(not isinstance(config.get(group, {}), dict) for group in _GROUPS):
        config = {}
    rows: list[dict[str, float]] = []
    answers: dict[str, Answers] = {}
    try:
        failure = failure or _failure(folder, root, comparison, record, config)
        rows, answers = read_metrics(folder / "metrics.csv"), read_answers(folder / "recall.csv")
        failure = failure or _missing(record, config) or _contradiction(answers, record)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        failure = failure or f"its files are damaged ({' '.join(str(error).split())})"
    return Run(
        folder=folder,
        variant=folder.parent.name if _SEED_FOLDER.fullmatch(folder.name) else "",
        seed=seed if isinstance(seed, int) else _seed_of(folder),
        config=config,
        record=record,
        rows=rows,
        answers=answers,
        failure=failure,
    )


def _missing(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Names a number that a report needs and a finished run lacks; empty if there is none."""
    known = {**dict(leaves(config)), **{f"run.json {key}": value for key, value in leaves(record)}}
    for key in _NEEDED:
        if not _is_number(known.get(key)):
            return f"{key} is not a number: not a run of this package, or damaged"
    return ""


def _is_sound(key: str, value: Any) -> bool:
    """Returns whether a value of run.json is of the kind that reports compute with."""
    if key in _NESTED and not isinstance(value, dict | None):
        return False
    return key not in _NUMBERS or all(leaf is None or leaf == {} or _is_number(leaf) for _, leaf in leaves(value, key))


def _is_number(value: Any) -> bool:
    # In Python True is an integer, and an integer may lie beyond all floats.
    return type(value) in (int, float) and -1e308 < value < 1e308


def _contradiction(answers: Mapping[str, Answers], record: Mapping[str, Any]) -> str:
    """Describes where recall.csv and run.json disagree: one of them was truncated or belongs to another run."""
    recall = record["metrics"].get("recall") or {}
    for form, answers_of_form in answers.items():
        stored = recall[form]
        exact = answers_of_form.exact
        if len(exact) != stored["n"] or abs(exact.mean() - stored["recall"]) > _ROUNDING:
            return f"its files are damaged (recall.csv and run.json differ about {form})"
    return ""


def _seed_of(folder: Path) -> int:
    digits = folder.name.removeprefix("seed-")
    return int(digits) if digits.isdigit() else 0


def _failure(
    folder: Path, root: Path | None, comparison: Comparison | None, record: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    status = record.get("status")
    if status == "finished":
        if not config:
            return "config.yaml is missing or damaged"
        metrics = record.get("metrics") or {}
        loss = metrics.get("test/loss", metrics.get("val/loss", math.nan))
        # JSON has no NaN and no infinity: null stands for both.
        return "diverged: the final loss is not finite" if loss is None else ""
    # A killed process could not write a reason into its record; the comparison kept its last line of output.
    last_words = comparison.failures.get(str(folder.relative_to(root)), "") if comparison and root else ""
    if status == "pruned":
        return f"pruned: {record.get('reason') or last_words}"
    if status == "failed":
        return str(record.get("reason") or last_words or "failed")
    if status == "running" and is_held(folder):
        return STILL_RUNNING
    return last_words or ("interrupted" if status in ("interrupted", "running") else "no record of a run")


def _named(runs: list[Run]) -> list[Run]:
    """Returns the runs with variant names for those whose folders do not name one."""
    nameless = [run for run in runs if not run.variant]
    configs = {run.folder: portable_leaves(run.config) for run in nameless}
    names: dict[Path, tuple[str, ...]] = {}
    for run in nameless:
        config = configs[run.folder]
        alike = [configs[other.folder] for other in nameless if other.record.get("ffn") == run.record.get("ffn")]
        differing = sorted({key for key in config if any(other.get(key) != config[key] for other in alike)})
        keys = [key for key in differing if key not in ("seed", "data.order_seed")]
        suffixes = tuple(f" {key}={_shown(config[key], [other.get(key) for other in alike])}" for key in keys)
        names[run.folder] = (_snake(str(run.record.get("ffn") or "run")), *suffixes)
    # Few keys make a readable name; a sweep of many needs as many as make it a name of one variant.
    longest, n_variants = max(map(len, names.values()), default=0), len(set(names.values()))
    shown = next((n for n in range(4, longest) if len({name[:n] for name in names.values()}) == n_variants), longest)
    shown = min(shown, longest) if n_variants > 1 else 4
    return [run if run.variant else replace(run, variant="".join(names[run.folder][:shown])) for run in runs]


def _shown(value: Any, among: Sequence[Any]) -> str:
    """Returns a value for a name: a number with four digits where these tell it from others, as samplers draw 17."""
    if isinstance(value, float):
        short = f"{value:.4g}"
        if not any(isinstance(other, float) and other != value and f"{other:.4g}" == short for other in among):
            return short
    return shorten(str(value), 30)


def _snake(name: str) -> str:
    known = {"MoE": "moe", "PKM": "pkm", "PEER": "peer", "UltraMem": "ultramem", "MemoryPlus": "memory_plus"}
    parts = name.split(" + ")
    return "+".join(known.get(part, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()) for part in parts)


def _without_duplicates(runs: Sequence[Run]) -> list[Run]:
    """Returns one run for each variant and seed that several comparisons share, a finished one if possible."""
    first: dict[tuple[str, int], Run] = {}
    for run in sorted(runs, key=lambda run: not run.ok):
        other = first.setdefault((run.variant, run.seed), run)
        if other is not run and _differ(other, run):
            raise RunDirectoryError(
                f"runs: {other.folder} and {run.folder} are both {run.variant} with seed {run.seed}, but differ; leave "
                "one out, or rename the folder of one variant."
            )
    return [run for run in runs if first[run.variant, run.seed] is run]


def _differ(one: Run, other: Run) -> bool:
    """Returns whether two runs differ in configuration, data or commit, as far as both have recorded them."""
    if one.config and other.config and portable_leaves(one.config) != portable_leaves(other.config):
        return True
    recorded = [(one.record.get(key), other.record.get(key)) for key in ("data", "commit")]
    return any(left != right for left, right in recorded if left is not None and right is not None)
