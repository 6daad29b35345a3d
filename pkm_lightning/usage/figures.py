"""The figures of `slot_metrics` for the counters of a run, over all ranks: every rank must ask, and gets the same.

Letters: N slots, H heads, S sub-keys a half.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pkm_lightning.usage.counters import Span, UsageCounters
from pkm_lightning.usage.slot_metrics import breadth, dead_slots, kl_from_uniform, spread

#: Version of the content of `report`.
SCHEMA = 1


def figures(counters: UsageCounters, name: str, span: Span) -> dict[str, float]:
    """`slot_metrics.spread` of a reader or of a set of tables; `effective` of a reader, of logged steps."""
    counted = counters.total(name, span)
    found = spread(counted.counts_N, counted.weights_N, counters.n_keys(name))
    return found | ({"effective": counters.mean_effective(name, span)} if name in counters.effective else {})


def dead(counters: UsageCounters, name: str, dead_after: int) -> int:
    """Slots of a reader or of a set of tables that nobody has read for the last `dead_after` steps of the clock."""
    return int(dead_slots(counters.last_read(name), counters.clock, dead_after).sum())


def figures_of_heads(counters: UsageCounters, name: str, span: Span) -> list[dict[str, float]]:
    """`kl_rows` and `kl_columns` of each head of a reader; of `full` counters `used_percent` and both `kl` too."""
    own, counted = counters.heads[name], counters.total_of_heads(name, span)
    found: list[dict[str, float]] = [{} for _ in range(own.heads)]
    if own.kind == "full":
        for head, counts_N, weights_N in zip(
            found, own.by_slot(counted.counts_N), own.by_slot(counted.weights_N), strict=True
        ):
            head |= breadth(counts_N, weights_N)
    if own.slots.n_keys is not None:
        for head, (rows_S, columns_S) in zip(found, own.by_sub_key(counted.counts_N, torch.sum), strict=True):
            head |= {"kl_rows": kl_from_uniform(rows_S), "kl_columns": kl_from_uniform(columns_S)}
    return found


def dead_of_heads(counters: UsageCounters, name: str, dead_after: int) -> list[int] | None:
    """`dead` of each head of a reader; None where its slots are not counted by head."""
    own = counters.heads[name]
    if own.kind != "full":
        return None
    last_HN = own.by_slot(counters.last_read_of_heads(name))
    return [int(n) for n in dead_slots(last_HN, counters.clock, dead_after).sum(1)]


def window_figures(counters: UsageCounters, dead_after: int) -> dict[str, float]:
    """Returns all figures of the window as `NAME/FIGURE`: of layers, of tables that several layers share, of heads."""
    shared = [name for name, table in counters.tables.items() if len(table.readers) > 1]
    found: dict[str, dict[str, float]] = {}
    for name in (*counters.readers, *shared):
        found[name] = figures(counters, name, "window") | {"dead": dead(counters, name, dead_after)}
    for name in counters.heads:
        by_head = dead_of_heads(counters, name, dead_after)
        for head, of_head in enumerate(figures_of_heads(counters, name, "window")):
            found[f"{name}.head{head}"] = of_head | ({} if by_head is None else {"dead": by_head[head]})
    return {f"{name}/{figure}": value for name, of in found.items() for figure, value in of.items()}


def report(counters: UsageCounters, step: int, dead_after: int) -> dict[str, Any]:
    """The content of usage.json.

    | key | meaning |
    |---|---|
    | schema | version of this table |
    | step, dead_after | last optimizer step; steps without a read after which a slot is dead |
    | clock | steps watched: `step`, and besides the steps that rollbacks have repeated |
    | first_step, window_steps | step of the clock that `since_start` begins with; how many of the last `window` holds |
    | layers | by name as in `train/usage/NAME/...`: `slots`, `reads`, `dead`, and the figures `since_start`, `window` |
    | | and, with `per_head`, `heads`: their own `first_step` and `window_steps`, the two as lists by head, and of |
    | | `per_head=full` a list `dead` |
    | tables | by name: `layers` that share the tables, and what a layer has, of all of them together |

    Figures that have no value, as no slot was read, are null.
    """
    # All have begun with the same step, or come from one checkpoint; only those of heads may be younger.
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
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
