"""Figures of `slot_metrics` from the counters of a run, over all ranks. Collective: call each of them on all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from pkm_lightning.usage.counters import Span, UsageCounters
from pkm_lightning.usage.slot_metrics import breadth, dead_slots, kl_from_uniform, spread

#: Version of the content of `report`.
SCHEMA = 1


def figures(counters: UsageCounters, name: str, span: Span) -> dict[str, float]:
    """Returns the `spread` of a reader or of a set of tables, and `effective` of a reader, mean over logged steps."""
    counted = counters.total(name, span)
    values = spread(counted.counts_N, counted.weights_N, counters.n_keys(name))
    return values | ({"effective": counters.mean_effective(name, span)} if name in counters.effective else {})


def dead(counters: UsageCounters, name: str, dead_after: int) -> int:
    """Returns the number of slots of a reader or set of tables without a read in the last `dead_after` steps."""
    return int(dead_slots(counters.last_read(name), counters.clock, dead_after).sum())


def figures_of_heads(counters: UsageCounters, name: str, span: Span) -> list[dict[str, float]]:
    """Returns `kl_rows` and `kl_columns` per head of a reader; with `full` also `used_percent` and the KL of slots."""
    heads, counted = counters.heads[name], counters.total_of_heads(name, span)
    by_head: list[dict[str, float]] = [{} for _ in range(heads.heads)]
    if heads.kind == "full":
        for values, counts_N, weights_N in zip(
            by_head, heads.by_slot(counted.counts_N), heads.by_slot(counted.weights_N), strict=True
        ):
            values |= breadth(counts_N, weights_N)
    if heads.slots.n_keys is not None:
        for values, (rows_S, columns_S) in zip(by_head, heads.by_sub_key(counted.counts_N, torch.sum), strict=True):
            values |= {"kl_rows": kl_from_uniform(rows_S), "kl_columns": kl_from_uniform(columns_S)}
    return by_head


def dead_of_heads(counters: UsageCounters, name: str, dead_after: int) -> list[int] | None:
    """Returns `dead` per head of a reader; None if its slots are not counted per head."""
    heads = counters.heads[name]
    if heads.kind != "full":
        return None
    last_HN = heads.by_slot(counters.last_read_of_heads(name))
    return [int(n) for n in dead_slots(last_HN, counters.clock, dead_after).sum(1)]


def window_figures(counters: UsageCounters, dead_after: int) -> dict[str, float]:
    """Returns all figures of the window as `NAME/FIGURE`: of layers, of tables that several layers share, of heads."""
    shared = [name for name, table in counters.tables.items() if len(table.readers) > 1]
    by_name: dict[str, dict[str, float]] = {}
    for name in (*counters.readers, *shared):
        by_name[name] = figures(counters, name, "window") | {"dead": dead(counters, name, dead_after)}
    for name in counters.heads:
        dead_by_head = dead_of_heads(counters, name, dead_after)
        for head, values in enumerate(figures_of_heads(counters, name, "window")):
            by_name[f"{name}.head{head}"] = values | ({} if dead_by_head is None else {"dead": dead_by_head[head]})
    return {f"{name}/{figure}": value for name, values in by_name.items() for figure, value in values.items()}


def report(counters: UsageCounters, step: int, dead_after: int) -> dict[str, Any]:
    """Returns the content of usage.json.

    | key | meaning |
    |---|---|
    | schema | version of this table |
    | step, dead_after | last optimizer step; steps without a read after which a slot is dead |
    | clock | steps watched: `step`, plus the steps that rollbacks have repeated |
    | first_step, window_steps | first step of the clock in `since_start`; number of the last steps in `window` |
    | layers | by name as in `train/usage/NAME/...`: `slots`, `reads`, `dead`, and the figures `since_start`, `window` |
    | | and, with `per_head`, `heads`: `first_step`, `window_steps`, the two as lists by head, and with |
    | | `per_head=full` a list `dead` |
    | tables | by name: `layers` that share the tables, and what a layer has, of all of them together |

    Figures that have no value, as no slot was read, are null.
    """
    # All counters began at the same step, or come from one checkpoint; only those of heads may be younger.
    first = next(iter(counters.counts.values()))
    entries = {name: _entry(counters, name, dead_after) for name in (*counters.readers, *counters.tables)}
    for name, table in counters.tables.items():
        entries[name] = {"layers": list(table.readers), **entries[name]}
    return {
        "schema": SCHEMA,
        "step": step,
        "dead_after": dead_after,
        "clock": counters.clock,
        "first_step": first.first_step,
        "window_steps": first.window_steps(counters.clock),
        "layers": {name: entries[name] for name in counters.readers},
        "tables": {name: entries[name] for name in counters.tables},
    }


def _entry(counters: UsageCounters, name: str, dead_after: int) -> dict[str, Any]:
    counts_N = counters.total(name, "ever").counts_N
    entry: dict[str, Any] = {
        "slots": len(counts_N),
        "reads": int(counts_N.sum()),
        "dead": dead(counters, name, dead_after),
        "since_start": _finite(figures(counters, name, "ever")),
        "window": _finite(figures(counters, name, "window")),
    }
    if name in counters.heads:
        heads = counters.heads[name]
        entry["heads"] = {
            "first_step": heads.first_step,
            "window_steps": heads.window_steps(counters.clock),
            "since_start": [_finite(head) for head in figures_of_heads(counters, name, "ever")],
            "window": [_finite(head) for head in figures_of_heads(counters, name, "window")],
        }
        by_head = dead_of_heads(counters, name, dead_after)
        if by_head is not None:
            entry["heads"]["dead"] = by_head
    return entry


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    # JSON has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
