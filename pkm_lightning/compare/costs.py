"""The cost of a run from its record: counts (parameters, FLOPs, bytes) and measurements (time, memory)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pkm_lightning.compare.records import Run

Getter = Callable[[Mapping[str, Any]], Any]

#: Name in runs.csv, and its place in run.json. Units: parameters, FLOPs or bytes per token, seconds, bytes.
FIGURES: dict[str, Getter] = {
    "params_total": lambda r: r["params"]["total"],
    "params_active": lambda r: r["params"]["active"],
    "params_table": lambda r: r["params"]["table"],
    # A training step takes three times the forward FLOPs: one forward and two backward products.
    "trunk_flops_forward": lambda r: r["flops_per_token"]["trunk"]["train"] / 3,
    "trunk_flops_train": lambda r: r["flops_per_token"]["trunk"]["train"],
    "model_flops_train": lambda r: r["flops_per_token"]["train"],
    "model_flops_decode": lambda r: r["flops_per_token"]["decode"],
    "bytes_train": lambda r: r["bytes_per_token"]["train"],
    "bytes_decode": lambda r: r["bytes_per_token"]["decode"],
    "tokens": lambda r: r["tokens"],
    "seconds_train": lambda r: r["seconds"]["train"],
    "processor_seconds": lambda r: r["seconds"]["processor"],
    "tokens_per_second": lambda r: r["tokens_per_second"],
    "peak_memory_bytes": lambda r: r["peak_memory_bytes"],
    "facts": lambda r: r["facts"],
}
#: Units of a training's total cost: FLOPs of the trunk, of the model, seconds, processor seconds; see `training_cost`.
BASES = ("trunk", "model", "time", "processor")
_SECONDS = {"time": "seconds_train", "processor": "processor_seconds"}
# Where a plugin states no cost, the record's sums leave it out: they would be too low.
_STATED_BY_PLUGINS = frozenset(name for name in FIGURES if "flops" in name or name.startswith("bytes_"))


def cost(run: Run, name: str) -> float:
    """Returns one of `FIGURES`; nan where the record lacks it or a plugin states no cost."""
    if name in _STATED_BY_PLUGINS and run.record.get("unknown_cost"):
        return math.nan
    try:
        value = FIGURES[name](run.record)
    except (KeyError, TypeError):
        return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def training_cost(run: Run, basis: str) -> float:
    """Returns the cost of the whole training.

    Args:
        run: a finished run.
        basis: `trunk`: FLOPs of all layers; `model`: with the unembedding at every position; `time`: seconds;
            `processor`: seconds of the processors, where it was one process.
    """
    if basis in _SECONDS:
        return cost(run, _SECONDS[basis])
    return cost(run, f"{basis}_flops_train") * cost(run, "tokens")
