"""In what the runs of a report differ: what must, what was decided by an equal procedure, and what makes them unfair.

| kind | what |
|---|---|
| ffn | the FFN, its placement, whether its layers share a table, the size that `match=` solved: what is compared |
| seed | the seed, and what follows it |
| sweep | the learning rate that the same sweep has chosen for each arm |
| budget | the number of steps that fill the same seconds |
| other | everything else, `match` itself too: the runs differ in more than the FFN and its size |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pkm_lightning.compare.comparison_file import Comparison, sweep_settings
from pkm_lightning.compare.costs import cost
from pkm_lightning.compare.leaves import leaves, portable_leaves
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.compare.records import Run

#: Shares by which lengths of runs may differ: tokens of one seed, and tokens of several seeds, or seconds.
_EQUAL_TOKENS, _EQUAL_OVER_SEEDS = 0.01, 0.1
_OF_THE_FFN = ("ffn", "placement", "table.shared", "match_budget")
_OF_THE_BUDGET = ("trainer.max_steps", "trainer.val_check_interval")
#: Of run.json: where and on what a run ran. Figures of time and memory are not comparable where these differ.
_CIRCUMSTANCES = ("precision", "device", "world_size", "threads", "versions", "commit", "data")
_RECORDED = "run.json: "
#: Keys of differences in the lengths of runs.
LENGTHS = (f"{_RECORDED}tokens", f"{_RECORDED}seconds_train")
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs.

    Args:
        key: of config.yaml, or of run.json as `run.json: KEY`.
        kind: see the module's table.
        values: the value of each arm, several where its runs differ.
        said_by: variants whose own overrides name the key.
    """

    key: str
    kind: str
    values: dict[str, tuple[str, ...]]
    said_by: tuple[str, ...] = ()


def find_differences(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Difference]:
    """All differences between runs that have a configuration, unfair ones first."""
    known = [run for run in runs if run.config]
    content = {id(run): {**portable_leaves(run.config), **_circumstances(run)} for run in known}
    found = []
    for key in sorted({key for of_run in content.values() for key in of_run}):
        values: dict[str, tuple[str, ...]] = {}
        for run in known:
            if key.startswith(_RECORDED) and not run.ok and content[id(run)].get(key) is None:
                continue  # it has not come so far as to know
            value = _on_one_line(content[id(run)].get(key, _ABSENT))
            values[run.arm] = tuple(dict.fromkeys((*values.get(run.arm, ()), value)))
        if len({value for of_arm in values.values() for value in of_arm}) > 1:
            found.append(Difference(key, _kind(key, values, known, comparisons), values, _said_by(key, comparisons)))
    found += _unequal_lengths(known, comparisons)
    order = ("other", "sweep", "budget", "ffn", "seed")
    return sorted(found, key=lambda difference: (order.index(difference.kind), difference.key))


def find_differences_of_sweep(
    runs: Sequence[Run], swept: Sequence[Run], comparisons: Sequence[Comparison], reported: Sequence[Difference]
) -> list[Difference]:
    """In what the runs of a sweep differ from each other or from the runs that are reported, and must not.

    Args:
        reported: differences of the runs that are reported.
    """
    known = {difference.key for difference in reported if difference.kind == "other"}
    ours = ("optim.lr", "seed", "data.order_seed", "data.seed", f"{_RECORDED}data", *LENGTHS)
    found = find_differences([*runs, *swept], comparisons) if swept else []
    return [
        replace(difference, key=f"sweep: {difference.key}")
        for difference in found
        if difference.kind == "other" and difference.key not in ours and difference.key not in known
    ]


def _unequal_lengths(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Difference]:
    """Runs that were to be of equal tokens, or seconds, and are not.

    The tokens of a step depend on the seed, which packs rows in another order, but not on the FFN.
    """
    timed = equal_seconds(runs, comparisons) is not None
    name = "seconds_train" if timed else "tokens"
    lengths = [(run.arm, run.seed, cost(run, name)) for run in runs if run.ok]
    seeds = {seed for _, seed, _ in lengths}
    of_a_seed = [[length for _, own, length in lengths if own == seed] for seed in seeds]
    if not _unequal([length for *_, length in lengths], _EQUAL_OVER_SEEDS) and (
        timed or not any(_unequal(group, _EQUAL_TOKENS) for group in of_a_seed)
    ):
        return []
    values: dict[str, tuple[str, ...]] = {}
    for arm, _, length in lengths:
        values[arm] = tuple(dict.fromkeys((*values.get(arm, ()), f"{length:,.0f}")))
    return [Difference(f"{_RECORDED}{name}", "other", values)]


def _unequal(lengths: Sequence[float], share: float) -> bool:
    return bool(lengths) and max(lengths) > (1 + share) * min(lengths)


def equal_seconds(runs: Iterable[Run], comparisons: Sequence[Comparison]) -> float | None:
    """The seconds that every run was given; None if they were not given the same."""
    given = {comparison.seconds for comparison in comparisons}
    covered = {arm for comparison in comparisons for arm in comparison.arms}
    if len(given) != 1 or not {run.arm for run in runs} <= covered:
        return None
    (seconds,) = given
    return seconds


def _circumstances(run: Run) -> dict[str, Any]:
    given = {key: run.record.get(key) for key in _CIRCUMSTANCES}
    return {f"{_RECORDED}{key}": value for key, value in leaves(given)}


def _kind(
    key: str, values: Mapping[str, tuple[str, ...]], runs: Sequence[Run], comparisons: Sequence[Comparison]
) -> str:
    if key in ("seed", "data.order_seed"):
        return "seed" if key == "seed" or _follows_the_seed(runs) else "other"
    # Within an arm nothing but the seed may differ.
    if any(len(of_arm) > 1 for of_arm in values.values()):
        return "other"
    if any(key == own or key.startswith(f"{own}.") for own in _OF_THE_FFN) or key in _sized(runs):
        return "ffn"
    if key == "optim.lr" and all(_was_chosen(arm, of_arm, comparisons) for arm, of_arm in values.items()):
        return "sweep"
    if key in _OF_THE_BUDGET and equal_seconds(runs, comparisons) is not None:
        return "budget"
    return "other"


def _follows_the_seed(runs: Iterable[Run]) -> bool:
    return all((run.config.get("data") or {}).get("order_seed") == run.config.get("seed") for run in runs)


def _sized(runs: Iterable[Run]) -> set[str]:
    """Keys that `match=` solved for, which may lie outside `ffn`."""
    knobs = set()
    for run in runs:
        size_by, match = (run.config.get("ffn") or {}).get("_size_by_"), str(run.config.get("match"))
        if isinstance(size_by, Mapping) and match in size_by:
            knobs.add(str(size_by[match]))
    return knobs


def _was_chosen(arm: str, rates: tuple[str, ...], comparisons: Sequence[Comparison]) -> bool:
    """A sweep has chosen the learning rate of this arm, and there is no other sweep."""
    sweeps = [comparison.sweep for comparison in comparisons if comparison.sweep]
    if any(sweep_settings(sweep) != sweep_settings(sweeps[0]) for sweep in sweeps):
        return False
    chosen = [sweep["chosen"].get(arm) for sweep in sweeps]
    return rates in [(_on_one_line(rate),) for rate in chosen if rate is not None]


def _said_by(key: str, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The variants whose own overrides name the key, or something that it lies in."""
    saying = []
    for comparison in comparisons:
        for arm, overrides in comparison.arms.items():
            said = [key_of(override).replace("/", ".") for override in overrides]
            if any(key == own or key.startswith(f"{own}.") for own in said):
                saying.append(arm)
    return tuple(dict.fromkeys(saying))


def _on_one_line(value: Any) -> str:
    """`value` as a table shows it."""
    return value if isinstance(value, str) else json.dumps(value)
