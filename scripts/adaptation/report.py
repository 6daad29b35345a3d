"""The report of a comparison: report.md with tables, plots and commands; curves.csv with every point."""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from commands import shown
from curves import BENCHMARK, FIGURES, LEARNED
from drawing import PANELS, draw
from edits import edited_facts
from records import curve_of
from study import Study
from tables import (
    COLUMNS,
    LEVELS,
    Variant,
    cell,
    curve_rows,
    equal_learning,
    equal_seconds,
    equal_steps,
    shortest,
    variants,
)

from pkm_lightning.storage import write_beside
from pkm_lightning.training.machine import versions

_FIELDS = ("model", "method", "replay", "seed", "step", "seconds", "wall", "lost", *FIGURES)


def write_report(studies: Sequence[Study], folder: Path) -> Path:
    """Writes the report into `folder` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_section(study, folder) for study in studies]
    rows = [row for study in studies for row in curve_rows(study, variants(study))]
    text = io.StringIO(newline="")
    benchmarks = dict.fromkeys(name for row in rows for name in row if name.startswith(BENCHMARK))
    writer = csv.DictWriter(text, [*_FIELDS, *benchmarks], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_beside(folder / "curves.csv", text.getvalue())
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    report = templates.get_template("report.md.jinja").render(
        sections=sections,
        columns=list(COLUMNS),
        date=datetime.date.today().isoformat(),
        devices=_distinct(studies, "device"),
        commits=_distinct(studies, "commit"),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
    write_beside(folder / "report.md", report)
    return folder / "report.md"


def _distinct(studies: Sequence[Study], name: str) -> str:
    """Returns the values of an entry in the records of all runs: a comparison may have been continued elsewhere."""
    records = (
        study.run_record(method, seed, replayed) or {}
        for study in studies
        for seed in study.seeds
        for method, replayed in study.variants()
    )
    return "; ".join(dict.fromkeys(str(record[name]) for record in records if record.get(name))) or "unknown"


def _section(study: Study, folder: Path) -> dict[str, Any]:
    chosen = variants(study)
    first = study.seeds[0]
    starts = [start for seed in study.seeds if (start := study.record(f"start-{seed}")) is not None]
    edited, _ = study.editable(first) if study.includes("edit") else (Path(), None)
    edit = ["edit", f"run_dir={edited}", f"facts={edited_facts(study.task(first))}", *study.plan.edit]
    return {
        "plan": study.plan,
        "seeds": len(study.seeds),
        "starts": _start_rows(starts),
        "changed_starts": any(len(start["digests"]) > 1 for start in starts),
        "methods": [
            (
                variant.label,
                variant.method.learns,
                " ".join(study.setting(variant.method)),
                *_costs(study, variant),
            )
            for variant in chosen
        ],
        "tries": _try_rows(study),
        "steps": equal_steps(study, chosen),
        "seconds": equal_seconds(chosen),
        "shortest": shortest(chosen),
        "learning": {words: equal_learning(chosen, figure, share) for figure, share, words in LEVELS},
        "plots": [file for name in PANELS if (file := draw(name, study.plan.name, chosen, folder))],
        "common": shown(["fit", "run_dir=RUN", *study.shown(study.common(first, first))]),
        "commands": [(v.label, " ".join(study.shown(study.specific(v.method, first, v.replayed)))) for v in chosen],
        "benchmarks": _benchmark_rows(study, chosen),
        "edits": _edit_rows(study),
        "edit_command": shown(study.shown(edit)),
        "failures": study.failures(),
    }


def _costs(study: Study, variant: Variant) -> tuple[str, str]:
    """Returns thousands of parameters that learn, of chosen rows the whole table; seconds of a run with evaluations."""
    found = (study.run_record(variant.method, seed, variant.replayed) for seed in study.seeds)
    records = [record for record in found if record is not None]
    if not records:
        return "-", "-"
    seconds = sum(record["cpu_seconds"] for record in records) / len(records)
    return f"{records[0]['trained_bytes'] / 4e3:,.0f}", f"{seconds:,.0f}"


def _try_rows(study: Study) -> list[tuple[str, str, str, str]]:
    """Returns method, setting, recall of paraphrases and share of A lost of each try."""
    rows = []
    for method in study.chosen_methods():
        for name, setting in study.tries(method).items():
            record = study.record(name)
            last = None if record is None else curve_of(record)[-1]
            figures = ("-", "-") if last is None else (f"{100 * last.value(n):.1f}" for n in (LEARNED, "lost"))
            mark = " (chosen)" if setting == study.setting(method) else ""
            rows.append((f"{method.label}{mark}", " ".join(setting), *figures))
    return rows


def _benchmark_rows(study: Study, chosen: Sequence[Variant]) -> list[list[str]]:
    """Returns the names of the scores, then those of the starting model and of each variant at its end; or nothing."""
    start = study.record("benchmarks")
    if start is None:
        return []
    rows = [
        ["", *(name.removeprefix(BENCHMARK) for name in start)],
        ["starting model", *(f"{v:.3f}" for v in start.values())],
    ]
    for variant in chosen:
        cells = (cell([curve[-1].value(name) for curve in variant.present], 3) for name in start)
        rows.append([variant.label, *cells])
    return rows


def _edit_rows(study: Study) -> list[tuple[str, str]]:
    """Returns figures of the edits by their names, means over seeds; none where there is no edit."""
    edits = [edit for seed in study.seeds if (edit := study.record(f"edit-{seed}")) is not None]
    if not edits:
        return []

    def row(name: str, values: Sequence[float], digits: int) -> tuple[str, str]:
        return name, cell(values, digits)

    forms = list(dict.fromkeys(form for edit in edits for form in edit["learned"]))
    lost_of = [(edit["known_before"], edit["known"]) for edit in edits]
    shares = [1 - now["paraphrase"] / before["paraphrase"] for before, now in lost_of if before.get("paraphrase")]
    return [
        row("facts", [edit["facts"] for edit in edits], 0),
        *(row(f"{form}, %", [100 * e["learned"][form] for e in edits if form in e["learned"]], 1) for form in forms),
        row("A lost, %", [100 * share for share in shares], 1),
        row("KL", [edit["kl"] for edit in edits], 5),
        row("perplexity, %", [100 * math.expm1(edit["loss_change"]) for edit in edits], 2),
        row("CPU seconds of the command", [edit["seconds"] for edit in edits], 1),
        row("wall seconds of the command", [edit["wall"] for edit in edits], 1),
        row("kB of the file", [edit["bytes"] / 1e3 for edit in edits], 1),
        row("removed to the last bit, %", [100 * edit["removed_exactly"] for edit in edits], 0),
    ]


def _start_rows(starts: Sequence[dict[str, dict[str, float]]]) -> list[tuple[str, str, str]]:
    """Returns form, share answered by the starting model alone and with the facts in its prompt, in per cent."""
    forms = list(dict.fromkeys(form for start in starts for form in start["alone"]))

    def mean(kind: str, form: str) -> str:
        values = [start[kind][form] for start in starts if form in start[kind]]
        return f"{100 * sum(values) / len(values):.1f}" if values else "-"

    return [(form, mean("alone", form), mean("in_context", form)) for form in forms]
