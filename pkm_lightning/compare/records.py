"""Runs read back from their directories: configuration, record, curves, answers. No model is needed for any of it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pkm_lightning.compare.comparison_file import Comparison, read_comparison
from pkm_lightning.compare.leaves import leaves
from pkm_lightning.compare.run_state import is_held, read_record
from pkm_lightning.errors import RunDirectoryError

_SEED_FOLDER = re.compile(r"seed-\d+")
#: Folders of a comparison whose runs are not reported.
_NOT_REPORTED = ("sweep", "speed")


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
    comparisons: list[Comparison] = []
    found: dict[Path, tuple[Path, Comparison | None]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunDirectoryError(f"runs: {folder} is no directory.")
        comparison = read_comparison(folder)
        if comparison is not None:
            comparisons.append(comparison)
        records = sorted(folder.rglob("run.json"))
        own = [r.parent for r in records if not set(r.relative_to(folder).parts[:1]) & set(_NOT_REPORTED)]
        own += _never_begun(folder, comparison, own)
        if not own:
            raise RunDirectoryError(f"runs: {folder} holds no record of a run (run.json).")
        for run in own:
            found.setdefault(run.resolve(), (folder, comparison))
    runs = _named([_read(run, *origin) for run, origin in found.items()])
    runs = _without_twins(runs)
    order = [arm for comparison in comparisons for arm in comparison.arms]
    rank = {arm: i for i, arm in enumerate(dict.fromkeys([*order, *(run.arm for run in runs)]))}
    return sorted(runs, key=lambda run: (rank[run.arm], run.seed)), comparisons


def _never_begun(folder: Path, comparison: Comparison | None, begun: Iterable[Path]) -> list[Path]:
    """Runs that failed before they had a record."""
    failed = [] if comparison is None else [folder / path for path in comparison.failures]
    known = {path.resolve() for path in begun}
    return [path for path in failed if path.resolve() not in known and path.relative_to(folder).parts[0] == "runs"]


def _read(folder: Path, origin: Path, comparison: Comparison | None) -> Run:
    record, config = read_record(folder), _config(folder)
    seed = record.get("seed", _seed_of(folder))
    return Run(
        folder=folder,
        arm=folder.parent.name if _SEED_FOLDER.fullmatch(folder.name) else "",
        seed=int(seed),
        config=config,
        record=record,
        rows=read_metrics(folder / "metrics.csv"),
        answers=read_answers(folder / "recall.csv"),
        failure=_failure(folder, origin, comparison, record, config),
    )


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
    folder: Path, origin: Path, comparison: Comparison | None, record: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    status = record.get("status")
    if status == "finished":
        if not config:
            return "config.yaml is missing or damaged"
        loss = (record.get("metrics") or {}).get("test/loss", math.nan)
        # JSON has no word for NaN and infinity: null was one of them.
        return "diverged: the test loss is not finite" if loss is None else ""
    told = "" if comparison is None else comparison.failures.get(_relative(folder, origin), "")
    if status == "failed":
        return str(record.get("reason") or told or "failed")
    if status == "running" and is_held(folder):
        return "still running"
    return told or ("interrupted" if status in ("interrupted", "running") else "no record of a run")


def _relative(folder: Path, origin: Path) -> str:
    try:
        return str(folder.relative_to(origin.resolve()))
    except ValueError:
        return str(folder)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; a file that is missing or being written gives what it has."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            raw = list(csv.DictReader(opened))
    except OSError:
        return []
    rows = []
    for line in raw:
        try:
            rows.append({key: float(value) for key, value in line.items() if key and value not in ("", None)})
        except (TypeError, ValueError):
            continue
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
    kinds = {id(run): {k: v for k, v in leaves(run.config) if k not in ("seed", "run_dir")} for run in nameless}
    names = {}
    for run in nameless:
        base = _snake(str(run.record.get("ffn") or "run"))
        alike = [kinds[id(other)] for other in nameless if other.record.get("ffn") == run.record.get("ffn")]
        own = kinds[id(run)]
        keys = sorted({key for key in own if any(other.get(key) != own[key] for other in alike)})
        telling = [key for key in keys if not _of_the_run(str(own[key]), run) and key != "data.order_seed"]
        names[id(run)] = base + "".join(f" {key}={own[key]}" for key in telling[:3])
    return [run if run.arm else _with_arm(run, names[id(run)]) for run in runs]


def _of_the_run(value: str, run: Run) -> bool:
    return str(run.config.get("run_dir", "\0")) in value


def _with_arm(run: Run, arm: str) -> Run:
    return Run(**{**{name: getattr(run, name) for name in Run.__dataclass_fields__}, "arm": arm})


def _snake(name: str) -> str:
    known = {"MoE": "moe", "PKM": "pkm", "PEER": "peer", "UltraMem": "ultramem", "MemoryPlus": "memory_plus"}
    return known.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def _without_twins(runs: Sequence[Run]) -> list[Run]:
    """Of runs that several comparisons have in common, one."""
    kept: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = kept.setdefault((run.arm, run.seed), run)
        if other is not run and _identity(other) != _identity(run):
            raise RunDirectoryError(
                f"runs: {other.folder} and {run.folder} are both {run.arm} with seed {run.seed}, but differ; leave one "
                "out, or rename the folder of one variant."
            )
    return list(kept.values())


def _identity(run: Run) -> tuple[dict[str, Any], Any]:
    """What makes two runs the same: configuration, without paths, and data."""
    own = str(run.config.get("run_dir", ""))
    shown = {
        key: value.replace(own, "RUN_DIR") if own and isinstance(value, str) else value
        for key, value in leaves(run.config)
    }
    return {key: value for key, value in shown.items() if key != "run_dir"}, run.record.get("data")


def to_json(value: Any) -> str:
    """`value` on one line, for tables of keys and values."""
    return value if isinstance(value, str) else json.dumps(value)
