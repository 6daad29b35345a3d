"""In what the runs of a report differ: what must, what was decided by an equal procedure, and what makes them unfair.

| kind | what |
|---|---|
| ffn | the FFN, its placement, whether its layers share a table, the size that `match=` solved: what is compared |
| seed | the seed, and what follows it |
| sweep | the learning rate that the same sweep has chosen for each arm |
| budget | the number of steps that fill the same seconds |
| other | everything else: the runs differ in more than the FFN and its size |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.leaves import leaves
from pkm_lightning.compare.records import Run, to_json

_OF_THE_SITTING = ("run_dir", "resume", "trust_config", "ckpt", "format", "out", "file", "overwrite", "device_memory")
_OF_THE_FFN = ("ffn", "placement", "table.shared", "match_budget")
_OF_THE_BUDGET = ("trainer.max_steps", "trainer.val_check_interval")
#: Of run.json: where and on what a run ran. Figures of time and memory are not comparable where these differ.
_CIRCUMSTANCES = ("precision", "device", "world_size", "threads", "versions", "commit", "data")
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
    content = {id(run): {**_configuration(run), **_circumstances(run)} for run in known}
    found = []
    for key in sorted({key for of_run in content.values() for key in of_run}):
        values: dict[str, tuple[str, ...]] = {}
        for run in known:
            value = to_json(content[id(run)].get(key, _ABSENT))
            values[run.arm] = tuple(dict.fromkeys((*values.get(run.arm, ()), value)))
        if len({value for of_arm in values.values() for value in of_arm}) > 1:
            found.append(Difference(key, _kind(key, values, known, comparisons), values, _said_by(key, comparisons)))
    order = ("other", "sweep", "budget", "ffn", "seed")
    return sorted(found, key=lambda difference: (order.index(difference.kind), difference.key))


def _configuration(run: Run) -> dict[str, Any]:
    """Leaves of the configuration; paths inside the run directory are the same everywhere."""
    own = str(run.config.get("run_dir", ""))
    shown = {}
    for key, value in leaves(run.config):
        if key.split(".")[0] not in _OF_THE_SITTING:
            shown[key] = value.replace(own, "RUN_DIR") if own and isinstance(value, str) else value
    return shown


def _circumstances(run: Run) -> dict[str, Any]:
    given = {key: run.record.get(key) for key in _CIRCUMSTANCES}
    return {f"run.json: {key}": value for key, value in leaves(given)}


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
    if key == "optim.lr" and comparisons and all(_swept(comparison, values) for comparison in comparisons):
        return "sweep"
    if key in _OF_THE_BUDGET and comparisons and all(comparison.seconds for comparison in comparisons):
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


def _swept(comparison: Comparison, values: Mapping[str, tuple[str, ...]]) -> bool:
    chosen = (comparison.sweep or {}).get("chosen") or {}
    own = [arm for arm in values if arm in comparison.arms]
    return all(arm in chosen and values[arm] == (to_json(chosen[arm]),) for arm in own)


def _said_by(key: str, comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    return tuple(
        arm
        for comparison in comparisons
        for arm, overrides in comparison.arms.items()
        if any(override.split("=")[0].lstrip("+~") == key for override in overrides)
    )
