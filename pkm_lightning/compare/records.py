"""Runs read back from their directories: configuration, record, curves, answers. No model is needed for any of it."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import yaml

from pkm_lightning.compare.comparison_file import NAME as COMPARISON_FILE
from pkm_lightning.compare.comparison_file import Comparison, read_comparison
from pkm_lightning.compare.leaves import leaves, portable_leaves
from pkm_lightning.compare.run_state import is_held, read_record
from pkm_lightning.errors import RunDirectoryError

#: Why a run that is under way gives no figures.
STILL_RUNNING = "still running"
_SEED_FOLDER = re.compile(r"seed-\d+")
#: Folders of a comparison whose runs are not reported.
_NOT_REPORTED = ("sweep", "speed")
#: Numbers without which nothing can be said of a finished run.
_NEEDED = (
    "model.dim",
    "model.n_layers",
    "optim.lr",
    "run.json params.total",
    "run.json tokens",
    "run.json seconds.train",
)
#: Keys of run.json that hold further keys, or nothing.
_NESTED = (
    "params",
    "flops_per_token",
    "bytes_per_token",
    "seconds",
    "throughput",
    "versions",
    "best_validation",
    "metrics",
)
#: Means of the same answers differ by no more.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Answers:
    """The answers of a run's test to the questions of one form, in the order of their prompts.

    Args:
        prompts: what was asked; the same for runs on the same facts.
        exact: whether each answer was right.
        bits: of knowledge about each, prior less model; nan where the prior is unknown.
        deciles: of each subject's exposure, 0 the most shown.
    """

    prompts: tuple[str, ...]
    exact: np.ndarray
    bits: np.ndarray
    deciles: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as reports see it.

    Args:
        folder: where it lies.
        arm: the variant that it belongs to.
        seed: its seed.
        config: config.yaml.
        record: run.json.
        rows: metrics.csv; what a row lacks is not in it.
        answers: of the test, by form; empty for data that ask nothing.
        failure: why it gives no figures; empty if it finished.
    """

    folder: Path
    arm: str
    seed: int
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[dict[str, float]]
    answers: dict[str, Answers]
    failure: str

    @property
    def ok(self) -> bool:
        """It finished with finite figures."""
        return not self.failure


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Comparison]]:
    """All runs under `folders`, each once, and the comparisons that they belong to.

    A run in NAME/seed-N is of the arm NAME; others are named by their FFN, and by what differs where more is needed.

    Raises:
        RunDirectoryError: a folder does not exist or holds no run, or two that differ are the same arm and seed.
    """
    comparisons, found = _locate(folders)
    reported = {run: root for run, root in found.items() if _part(run, root) not in _NOT_REPORTED}
    runs = _named([_read(run, root, comparisons.get(root) if root else None) for run, root in reported.items()])
    runs = _without_twins(runs)
    order = [arm for comparison in comparisons.values() for arm in comparison.arms]
    rank = {arm: i for i, arm in enumerate(dict.fromkeys([*order, *(run.arm for run in runs)]))}
    return sorted(runs, key=lambda run: (rank[run.arm], run.seed)), list(comparisons.values())


def read_swept(folders: Sequence[Path]) -> list[Run]:
    """The runs of the sweeps of learning rates of the comparisons in `folders`, by arm.

    Raises:
        RunDirectoryError: as `read_runs` does.
    """
    comparisons, found = _locate(folders)
    swept = [(run, root) for run, root in found.items() if root and _part(run, root) == "sweep"]
    return [replace(_read(run, root, comparisons[root]), arm=run.relative_to(root).parts[1]) for run, root in swept]


def _locate(folders: Sequence[Path]) -> tuple[dict[Path, Comparison], dict[Path, Path | None]]:
    """Comparisons by their directories; run directories, those never made too, each with that of its comparison."""
    comparisons: dict[Path, Comparison] = {}
    found: dict[Path, Path | None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunDirectoryError(f"runs: {folder} is no directory.")
        around = [parent / COMPARISON_FILE for parent in folder.resolve().parents]
        for file in (*filter(Path.exists, around), *sorted(folder.rglob(COMPARISON_FILE))):
            comparison = read_comparison(file.parent)
            assert comparison is not None
            comparisons.setdefault(file.parent.resolve(), comparison)
        begun = [file.parent.resolve() for file in sorted(folder.rglob("run.json"))]
        never = [
            root / path
            for root, c in comparisons.items()
            for path in c.failures
            if root.is_relative_to(folder.resolve())
        ]
        own = {run: _origin(run, comparisons) for run in (*begun, *never)}
        if all(_part(run, root) in _NOT_REPORTED for run, root in own.items()):
            of_sweeps = " but those of a sweep" if own else ""
            raise RunDirectoryError(f"runs: {folder} holds no record of a run (run.json){of_sweeps}.")
        found.update(own)
    return comparisons, found


def _origin(run: Path, comparisons: Iterable[Path]) -> Path | None:
    """The comparison that a run directory lies in, the inner one of several."""
    return max(
        (root for root in comparisons if run.is_relative_to(root)), key=lambda root: len(root.parts), default=None
    )


def _part(run: Path, root: Path | None) -> str:
    """The folder of its comparison that a run lies in; empty without one."""
    return run.relative_to(root).parts[0] if root else ""


def _read(folder: Path, root: Path | None, comparison: Comparison | None) -> Run:
    """A run whose files are damaged has failed; it takes nothing else with it."""
    whole, config = read_record(folder), _config(folder)
    record = {key: value for key, value in whole.items() if key not in _NESTED or isinstance(value, dict | None)}
    seed = record.get("seed")
    failure = "" if len(record) == len(whole) else "its files are damaged (run.json)"
    rows: list[dict[str, float]] = []
    answers: dict[str, Answers] = {}
    try:
        failure = failure or _failure(folder, root, comparison, record, config)
        rows, answers = read_metrics(folder / "metrics.csv"), read_answers(folder / "recall.csv")
        failure = failure or _missing(record, config) or _contradicted(answers, record)
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        failure = failure or f"its files are damaged ({' '.join(str(error).split())})"
    return Run(
        folder=folder,
        arm=folder.parent.name if _SEED_FOLDER.fullmatch(folder.name) else "",
        seed=seed if isinstance(seed, int) else _seed_of(folder),
        config=config,
        record=record,
        rows=rows,
        answers=answers,
        failure=failure,
    )


def _missing(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What a finished run lacks of what a report needs, in words."""
    known = {**dict(leaves(config)), **{f"run.json {key}": value for key, value in leaves(record)}}
    for key in _NEEDED:
        if isinstance(known.get(key), bool) or not isinstance(known.get(key), int | float):
            return f"{key} is no number: not a run of this package, or damaged"
    return ""


def _contradicted(answers: Mapping[str, Answers], record: Mapping[str, Any]) -> str:
    """Where recall.csv and run.json do not say the same, in words: one of them was cut short or is of another run."""
    recall = record["metrics"].get("recall") or {}
    for form, of_form in answers.items():
        said = recall[form]
        if len(of_form.exact) != said["n"] or abs(of_form.exact.mean() - said["recall"]) > _ROUNDING:
            return f"its files are damaged (recall.csv and run.json differ about {form})"
    return ""


def _seed_of(folder: Path) -> int:
    digits = folder.name.removeprefix("seed-")
    return int(digits) if digits.isdigit() else 0


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _failure(
    folder: Path, root: Path | None, comparison: Comparison | None, record: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    status = record.get("status")
    if status == "finished":
        if not config:
            return "config.yaml is missing or damaged"
        metrics = record.get("metrics") or {}
        loss = metrics.get("test/loss", metrics.get("val/loss", math.nan))
        # JSON has no word for NaN and infinity: null was one of them.
        return "diverged: the final loss is not finite" if loss is None else ""
    told = comparison.failures.get(str(folder.relative_to(root)), "") if comparison and root else ""
    if status == "failed":
        return str(record.get("reason") or told or "failed")
    if status == "running" and is_held(folder):
        return STILL_RUNNING
    return told or ("interrupted" if status in ("interrupted", "running") else "no record of a run")


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv that say when they were; a file that is missing or being written gives what it has."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            raw = list(csv.DictReader(opened))
    except OSError:
        return []
    rows = []
    for line in raw:
        try:
            row = {key: float(value) for key, value in line.items() if key and value not in ("", None)}
        except (TypeError, ValueError):
            continue
        if {"tokens", "seconds"} <= row.keys():
            rows.append(row)
    return rows


def read_answers(file: Path) -> dict[str, Answers]:
    """The answers in a recall.csv by form; empty without the file."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
    except OSError:
        return {}
    by_form: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        by_form.setdefault(line["form"], []).append(line)
    answers = {}
    for form, of_form in by_form.items():
        of_form.sort(key=lambda line: (line["relation"], line["prompt"], line["truth"]))
        answers[form] = Answers(
            prompts=tuple(f"{line['relation']}: {line['prompt']}" for line in of_form),
            exact=np.array([line["exact"] == "1" for line in of_form]),
            bits=np.array([float(line["prior_bits"]) - float(line["bits"]) for line in of_form]),
            deciles=np.array([int(line["decile"]) for line in of_form]),
        )
    return answers


def _named(runs: list[Run]) -> list[Run]:
    """The runs with a name for those that their folders do not name."""
    nameless = [run for run in runs if not run.arm]
    kinds = {run.folder: portable_leaves(run.config) for run in nameless}
    names = {}
    for run in nameless:
        own = kinds[run.folder]
        alike = [kinds[other.folder] for other in nameless if other.record.get("ffn") == run.record.get("ffn")]
        telling = sorted({key for key in own if any(other.get(key) != own[key] for other in alike)})
        told = [f" {key}={shorten(str(own[key]), 30)}" for key in telling if key not in ("seed", "data.order_seed")]
        names[run.folder] = _snake(str(run.record.get("ffn") or "run")) + "".join(told[:3])
    return [run if run.arm else replace(run, arm=names[run.folder]) for run in runs]


def _snake(name: str) -> str:
    known = {"MoE": "moe", "PKM": "pkm", "PEER": "peer", "UltraMem": "ultramem", "MemoryPlus": "memory_plus"}
    return known.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def _without_twins(runs: Sequence[Run]) -> list[Run]:
    """Of runs that several comparisons have in common one, a finished one if there is one."""
    kept: dict[tuple[str, int], Run] = {}
    for run in sorted(runs, key=lambda run: not run.ok):
        other = kept.setdefault((run.arm, run.seed), run)
        if other is not run and _differ(other, run):
            raise RunDirectoryError(
                f"runs: {other.folder} and {run.folder} are both {run.arm} with seed {run.seed}, but differ; leave one "
                "out, or rename the folder of one variant."
            )
    return [run for run in runs if kept[run.arm, run.seed] is run]


def _differ(one: Run, other: Run) -> bool:
    """They are not the same run: in configuration, data or commit, as far as both have come to know them."""
    if one.config and other.config and portable_leaves(one.config) != portable_leaves(other.config):
        return True
    known = [(one.record.get(key), other.record.get(key)) for key in ("data", "commit")]
    return any(left != right for left, right in known if left is not None and right is not None)
