"""The keys of `compare` and `report` (configs/compare.yaml), read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pkm_lightning.compare.metric import check_metric
from pkm_lightning.compare.objective import DEFAULT, check_objective, direction_of
from pkm_lightning.errors import ConfigError, check_flag, check_integer, check_range

#: Keys of the comparison, not of its runs; `fit` ignores them in an experiment.
COMPARE_KEYS = (
    "seeds", "jobs", "variants", "dense_ladder", "budget", "lr_sweep", "sweep", "warm_up", "report", "runs"
)  # fmt: skip
#: Keys that `compare` sets for each run itself, and what the user can do instead.
SET_BY_COMPARE = {
    "seed": "set seeds=",
    "run_dir": "set out=",
    "ckpt": "leave it out: the same command continues its runs",
}
# A variant's name becomes a folder's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DEFAULT_SWEEP = {"seeds": 1, "first_seed": 1001, "draw": 1, "metric": DEFAULT}
_DEFAULT_REPORT = {"metric": "auto", "resamples": 2000, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Settings of a sweep of learning rates.

    Args:
        learning_rates: the rates to try, two or more.
        seeds: seeds of the sweep's runs.
        draw: added to `data.draw` in its runs, for data that have that key.
        metric: a figure of validation, see `pkm_lightning.compare.objective`; the rate with the best mean is chosen.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    draw: int
    metric: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison; see configs/compare.yaml.

    Args:
        seeds: seeds of the reported runs.
        jobs: runs at a time.
        variants: overrides by variant, as `{KEY: VALUE}` with dotted keys.
        dense_ladder: whether to add dense models of several sizes.
        budget_tokens, budget_seconds: at most one of them is set.
        sweep: None without a sweep of learning rates.
        warm_up: whether two steps first compile kernels that depend on shapes, unless a sweep or a budget does.
    """

    seeds: tuple[int, ...]
    jobs: int
    variants: dict[str, dict[str, Any]]
    dense_ladder: bool
    budget_tokens: float | None
    budget_seconds: float | None
    sweep: SweepSettings | None
    warm_up: bool


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of a report: its metric, and the resamples and seed of its bootstrap."""

    metric: str
    resamples: int
    seed: int


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Reads the settings of `compare` from a composed configuration.

    Raises:
        ConfigError: a value is not allowed.
    """
    _check_whole(config)
    jobs = config["jobs"]
    check_integer("jobs", jobs, 1)
    check_flag("dense_ladder", config["dense_ladder"])
    check_flag("warm_up", config["warm_up"])
    budget = _mapping("budget", config["budget"], ("tokens", "seconds"))
    tokens, seconds = budget.get("tokens"), budget.get("seconds")
    if tokens is not None and seconds is not None:
        raise ConfigError(f"budget.tokens={tokens} and budget.seconds={seconds} exclude each other; set one of them.")
    if tokens is not None:
        check_range("budget.tokens", tokens, 1)
    if seconds is not None:
        check_range("budget.seconds", seconds, 1)
        if jobs != 1:
            raise ConfigError(
                f"budget.seconds={seconds} with jobs={jobs}: runs that share the machine slow each other down; set "
                "jobs=1, or use budget.tokens."
            )
    seeds = _seeds("seeds", config["seeds"], first=1)
    return Settings(
        seeds=seeds,
        jobs=jobs,
        variants=read_variants(config["variants"]),
        dense_ladder=config["dense_ladder"],
        budget_tokens=tokens,
        budget_seconds=seconds,
        sweep=_sweep(config, seeds),
        warm_up=config["warm_up"],
    )


def read_report_settings(config: Mapping[str, Any]) -> ReportSettings:
    """Reads the settings of a report.

    Raises:
        ConfigError: a value is not allowed.
    """
    report = {**_DEFAULT_REPORT, **_mapping("report", config.get("report"), tuple(_DEFAULT_REPORT))}
    check_integer("report.resamples", report["resamples"], 100, 1_000_000)
    check_integer("report.seed", report["seed"], 0)
    metric = check_metric("report.metric", str(report["metric"]), "auto")
    return ReportSettings(metric=metric, resamples=report["resamples"], seed=report["seed"])


def check_name(name: str) -> None:
    """Refuses a variant's name that cannot name a folder.

    Raises:
        ConfigError: the name has other characters than letters, digits, `_`, `-` and `.`.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"variants.{name}: a name consists of letters, digits, _ - and ., as in memory_plus_3; rename it."
        )


def _check_whole(config: Mapping[str, Any]) -> None:
    missing = [key for key in COMPARE_KEYS if key not in config]
    if missing:
        raise ConfigError(f"{missing[0]} was deleted from the configuration; set it to null or to a value.")


def _seeds(key: str, value: Any, first: int) -> tuple[int, ...]:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{key}=[] leaves nothing to run; set a number of seeds, 1 or more, or a list.")
        for seed in value:
            check_integer(key, seed, 0, 2**32 - 1)
        if len(set(value)) != len(value):
            raise ConfigError(f"{key}={value} contains a seed twice; list each once.")
        return tuple(value)
    check_integer(key, value, 1, 10_000)
    return tuple(range(first, first + value))


def _sweep(config: Mapping[str, Any], seeds: tuple[int, ...]) -> SweepSettings | None:
    rates = config["lr_sweep"]
    if rates is None:
        return None
    for rate in rates if isinstance(rates, list) else ():
        check_range("lr_sweep", rate, 1e-12)
    if not isinstance(rates, list) or len(set(rates)) < 2 or len(set(rates)) != len(rates):
        raise ConfigError(
            f"lr_sweep={rates} is not a list of two or more different learning rates; set for example [3e-3,6e-3]."
        )
    sweep = {**_DEFAULT_SWEEP, **_mapping("sweep", config["sweep"], tuple(_DEFAULT_SWEEP))}
    check_integer("sweep.first_seed", sweep["first_seed"], 0, 2**31)
    check_integer("sweep.draw", sweep["draw"], 0, 2**31)
    metric = str(sweep["metric"])
    check_objective("sweep.metric", metric)
    direction_of(metric)
    sweep_seeds = _seeds("sweep.seeds", sweep["seeds"], sweep["first_seed"])
    shared = sorted(set(sweep_seeds) & set(seeds))
    if shared:
        raise ConfigError(
            f"seed {shared[0]} belongs to the sweep and to the reported runs, which would then be tuned on what they "
            "report; set sweep.first_seed, or other seeds."
        )
    return SweepSettings(
        learning_rates=tuple(sorted(float(rate) for rate in rates)),
        seeds=sweep_seeds,
        draw=sweep["draw"],
        metric=metric,
    )


def read_variants(value: Any) -> dict[str, dict[str, Any]]:
    """Returns the overrides of each variant, as `{KEY: VALUE}` with dotted keys.

    Raises:
        ConfigError: a name cannot be a folder's, or something is not a mapping.
    """
    variants = {}
    for name, overrides in _mapping("variants", value).items():
        check_name(str(name))
        variants[str(name)] = _flat(_mapping(f"variants.{name}", overrides), "")
    return variants


def _flat(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns dotted keys: `+variants.moe.ffn.top_k=2` arrives nested, `+variants.moe={ffn.top_k: 2}` dotted."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        flat.update(_flat(value, where) if isinstance(value, Mapping) and value else {where: value})
    return flat


def _mapping(key: str, value: Any, allowed: tuple[str, ...] | None = None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} is not a mapping; write it as {key}={{KEY: VALUE}}.")
    unknown = [str(name) for name in value if allowed is not None and name not in allowed]
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]} is not known; allowed: {', '.join(allowed or ())}.")
    return {str(name): item for name, item in value.items()}
