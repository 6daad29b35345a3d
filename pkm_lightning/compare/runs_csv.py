"""runs.csv: one row per run, failed ones included, with every number that the report is made of."""

from __future__ import annotations

import math
from typing import Any

from pkm_lightning.compare.costs import FIGURES, cost
from pkm_lightning.compare.leaves import leaves
from pkm_lightning.compare.records import STILL_RUNNING, Run
from pkm_lightning.compare.study import Study
from pkm_lightning.storage import csv_line


def runs_csv(study: Study) -> str:
    """Returns the content of the file; a number that a run lacks is an empty field."""
    rows = [_row(study, run) for run in study.runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [csv_line(columns), *(csv_line(_field(row.get(column)) for column in columns) for row in rows)]
    return "".join(lines)


def _row(study: Study, run: Run) -> dict[str, Any]:
    record, metrics = run.record, dict(run.record.get("metrics") or {})
    recall = {tuple(key.split(".")): value for key, value in leaves(metrics.pop("recall", {}))}
    deciles = {
        f"recall_{key[0]}_decile_{key[2]}": value
        for key, value in recall.items()
        if key[1:2] == ("by_decile",) and key[-1] == "recall"
    }
    return {
        # The column keeps the name that files on disk have.
        "arm": run.variant,
        "seed": run.seed,
        "status": _status(run),
        "reason": run.failure,
        study.quality.metric: study.quality.value(run) if run.ok else None,
        "lr": dict(leaves(run.config)).get("optim.lr"),
        **{name: cost(run, name) for name in FIGURES},
        **{key: value for key, value in sorted(metrics.items()) if isinstance(value, int | float)},
        **deciles,
        "best_validation_loss": (record.get("best_validation") or {}).get("loss"),
        "ffn": record.get("ffn"),
        "precision": record.get("precision"),
        "device": record.get("device"),
        "world_size": record.get("world_size"),
        "threads": record.get("threads"),
        "data": str(record.get("data") or "")[:12],
        "commit": record.get("commit"),
        "torch": (record.get("versions") or {}).get("torch"),
        "started": record.get("started"),
    }


def _status(run: Run) -> str:
    """Returns the status of run.json, corrected where the process was killed or its metrics are useless."""
    status = str(run.record.get("status", "failed"))
    if status == "running":
        return "running" if run.failure == STILL_RUNNING else "interrupted"
    return "failed" if run.failure and status == "finished" else status


def _field(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        # Whole numbers without ".0", as long as a float holds them exactly.
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    return "" if value is None else value
