"""The keys in which the runs of a report differ, and whether each difference makes the comparison unfair.

| kind | difference |
|---|---|
| ffn | the FFN, those of `extra_ffns`, placements, shared tables, the size that `match=` solved: what is compared |
| seed | the seed, and keys that follow it |
| sweep | keys that a sweep varies, or the learning rate that one sweep has chosen for each variant |
| budget | the number of steps that fill the same seconds |
| other | everything else, `match` included: the runs differ in more than the FFN and its size |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pkm_lightning.compare.comparison_file import Comparison, sweep_settings
from pkm_lightning.compare.costs import cost
from pkm_lightning.compare.leaves import leaves, portable_leaves
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.compare.records import Run

# Shares by which the lengths of runs may differ: tokens at one seed; tokens over several seeds, or seconds. Another
# seed packs sequences in another order, so that the same steps hold slightly more or fewer tokens.
_EQUAL_TOKENS, _EQUAL_OVER_SEEDS = 0.01, 0.1
_FFN_KEYS = ("ffn", "extra_ffns", "placement", "table.shared", "match_budget")
_BUDGET_KEYS = ("trainer.max_steps", "trainer.val_check_interval")
# Keys of run.json that describe machine, code and data. Time and memory are not comparable where these differ.
_CIRCUMSTANCES = ("precision", "device", "world_size", "threads", "versions", "commit", "data")
_RECORDED = "run.json: "
#: Keys of differences in the length of runs.
LENGTHS = (f"{_RECORDED}tokens", f"{_RECORDED}seconds_train")
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs.

    Args:
        key: key of config.yaml, or `run.json: KEY`.
        kind: see the module's table.
        values: the values by variant, several where its runs differ.
        set_by: variants whose own overrides set the key.
    """

    key: str
    kind: str
    values: dict[str, tuple[str, ...]]
    set_by: tuple[str, ...] = ()


def varied_keys(folders: Sequence[Path]) -> tuple[str, ...]:
    """Returns the keys that the sweeps in `folders` vary, which sweep.csv has after `reason`; none of other folders."""
    keys: dict[str, None] = {}
    for folder in folders:
        try:
            with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), [])
        except (OSError, ValueError, csv.Error):
            return ()
        keys |= dict.fromkeys(header[header.index("reason") + 1 :] if "reason" in header else [])
    return tuple(keys)


def find_differences(
    runs: Sequence[Run], comparisons: Sequence[Comparison], varied: Collection[str] = ()
) -> list[Difference]:
    """Finds all differences between runs that have a configuration, unfair ones first; `varied` are keys of sweeps."""
    configured = [run for run in runs if run.config]
    content = {id(run): {**portable_leaves(run.config), **_circumstances(run)} for run in configured}
    differences = []
    for key in sorted({key for of_run in content.values() for key in of_run}):
        values: dict[str, tuple[str, ...]] = {}
        for run in configured:
            if key.startswith(_RECORDED) and not run.ok and content[id(run)].get(key) is None:
                continue  # the run ended before it could record the value
            value = _as_text(content[id(run)].get(key, _ABSENT))
            values[run.variant] = tuple(dict.fromkeys((*values.get(run.variant, ()), value)))
        if len({value for of_variant in values.values() for value in of_variant}) > 1:
            of_sweep = any(_lies_in(key, one) for one in varied)
            kind = "sweep" if of_sweep else _kind(key, values, configured, comparisons)
            differences.append(Difference(key, kind, values, _set_by(key, comparisons)))
    differences += _unequal_lengths(configured, comparisons)
    order = ("other", "sweep", "budget", "ffn", "seed")
    return sorted(differences, key=lambda difference: (order.index(difference.kind), difference.key))


def find_differences_of_sweep(
    runs: Sequence[Run], swept: Sequence[Run], comparisons: Sequence[Comparison], reported: Sequence[Difference]
) -> list[Difference]:
    """Finds unfair differences of a sweep's runs from each other and from the reported runs.

    Args:
        runs: the reported runs.
        swept: the runs of sweeps.
        comparisons: the comparisons of both.
        reported: differences between the reported runs, which are not repeated.
    """
    known = {difference.key for difference in reported if difference.kind == "other"}
    intended = ("optim.lr", "seed", "data.order_seed", "data.seed", "data.draw", f"{_RECORDED}data", *LENGTHS)
    differences = find_differences([*runs, *swept], comparisons) if swept else []
    return [
        replace(difference, key=f"sweep: {difference.key}")
        for difference in differences
        if difference.kind == "other" and difference.key not in intended and difference.key not in known
    ]


def _unequal_lengths(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Difference]:
    """Returns the difference in tokens, or in seconds where those were given, if it is larger than allowed."""
    is_timed = equal_seconds(runs, comparisons) is not None
    name = "seconds_train" if is_timed else "tokens"
    lengths = [(run.variant, run.seed, cost(run, name)) for run in runs if run.ok]
    by_seed = [
        [length for _, seed, length in lengths if seed == of_seed] for of_seed in {seed for _, seed, _ in lengths}
    ]
    if not _unequal([length for *_, length in lengths], _EQUAL_OVER_SEEDS) and (
        is_timed or not any(_unequal(group, _EQUAL_TOKENS) for group in by_seed)
    ):
        return []
    values: dict[str, tuple[str, ...]] = {}
    for variant, _, length in lengths:
        values[variant] = tuple(dict.fromkeys((*values.get(variant, ()), f"{length:,.0f}")))
    return [Difference(f"{_RECORDED}{name}", "other", values)]


def _unequal(lengths: Sequence[float], share: float) -> bool:
    return bool(lengths) and max(lengths) > (1 + share) * min(lengths)


def equal_seconds(runs: Iterable[Run], comparisons: Sequence[Comparison]) -> float | None:
    """Returns the budget of seconds that all runs had; None if they had none, or different ones."""
    budgets = {comparison.seconds for comparison in comparisons}
    covered = {variant for comparison in comparisons for variant in comparison.variants}
    if len(budgets) != 1 or not {run.variant for run in runs} <= covered:
        return None
    (seconds,) = budgets
    return seconds


def _circumstances(run: Run) -> dict[str, Any]:
    recorded = {key: run.record.get(key) for key in _CIRCUMSTANCES}
    return {f"{_RECORDED}{key}": value for key, value in leaves(recorded)}


def _kind(
    key: str, values: Mapping[str, tuple[str, ...]], runs: Sequence[Run], comparisons: Sequence[Comparison]
) -> str:
    if key in ("seed", "data.order_seed"):
        return "seed" if key == "seed" or _follows_the_seed(runs) else "other"
    # Within a variant only the seed may differ.
    if any(len(of_variant) > 1 for of_variant in values.values()):
        return "other"
    if any(_lies_in(key, ffn_key) for ffn_key in _FFN_KEYS) or key in _solved_keys(runs):
        return "ffn"
    if key == "optim.lr" and all(_was_chosen(variant, rates, comparisons) for variant, rates in values.items()):
        return "sweep"
    if key in _BUDGET_KEYS and equal_seconds(runs, comparisons) is not None:
        return "budget"
    return "other"


def _lies_in(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def _follows_the_seed(runs: Iterable[Run]) -> bool:
    return all((run.config.get("data") or {}).get("order_seed") == run.config.get("seed") for run in runs)


def _solved_keys(runs: Iterable[Run]) -> set[str]:
    """Returns the keys that `match=` solved for, which may lie outside `ffn`."""
    keys = set()
    for run in runs:
        size_by, match = (run.config.get("ffn") or {}).get("_size_by_"), str(run.config.get("match"))
        if isinstance(size_by, Mapping) and match in size_by:
            keys.add(str(size_by[match]))
    return keys


def _was_chosen(variant: str, rates: tuple[str, ...], comparisons: Sequence[Comparison]) -> bool:
    """Returns whether a sweep chose the learning rate of this variant, and all sweeps had the same settings."""
    sweeps = [comparison.sweep for comparison in comparisons if comparison.sweep]
    if any(sweep_settings(sweep) != sweep_settings(sweeps[0]) for sweep in sweeps):
        return False
    chosen = [sweep["chosen"].get(variant) for sweep in sweeps]
    return rates in [(_as_text(rate),) for rate in chosen if rate is not None]


def _set_by(key: str, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Returns the variants whose own overrides set the key, or a group that contains it."""
    names = []
    for comparison in comparisons:
        for variant, overrides in comparison.variants.items():
            # A group is named with slashes (`table/optimizer=...`), its keys with dots.
            if any(_lies_in(key, key_of(override).replace("/", ".")) for override in overrides):
                names.append(variant)
    return tuple(dict.fromkeys(names))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
