"""The keys of `compare` and `report` (configs/compare.yaml), checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pkm_lightning.compare.metric import check_metric
from pkm_lightning.errors import ConfigError, check_flag, check_integer, check_range

#: Keys that are of the comparison and not of its runs; an experiment that sets them may be trained by `fit` too.
COMPARE_KEYS = (
    "seeds", "jobs", "variants", "dense_ladder", "budget", "lr_sweep", "sweep", "warm_up", "report", "runs"
)  # fmt: skip
#: Keys that `compare` sets for each run itself, and what to say instead.
SET_BY_COMPARE = {
    "seed": "seeds=",
    "run_dir": "out=",
    "ckpt": "nothing: runs are continued by the same command",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DEFAULT_SWEEP = {"seeds": 1, "first_seed": 1001, "data_seed": 1000, "metric": "test/loss"}
_DEFAULT_REPORT = {"metric": "auto", "resamples": 2000, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How learning rates are tried.

    Args:
        learning_rates: those to try, two or more.
        seeds: of the runs of a sweep.
        data_seed: added to `data.seed`.
        metric: as `pkm_lightning.compare.metric` names it; the best mean wins.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    data_seed: int
    metric: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for; see configs/compare.yaml.

    Args:
        variants: overrides by variant, as `{KEY: VALUE}` with dotted keys.
        budget_tokens, budget_seconds: at most one of them.
        sweep: None without one.
        warm_up: each variant is run for two steps before, where neither a sweep nor a budget of seconds does so.
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
    """What a report is about, and its bootstrap."""

    metric: str
    resamples: int
    seed: int


def read_settings(config: Mapping[str, Any]) -> Settings:
    """The settings of `compare` in a composed configuration.

    Raises:
        ConfigError: a value that cannot work.
    """
    _check_whole(config)
    jobs = config["jobs"]
    check_integer("jobs", jobs, 1)
    check_flag("dense_ladder", config["dense_ladder"])
    check_flag("warm_up", config["warm_up"])
    budget = _mapping("budget", config["budget"], ("tokens", "seconds"))
    tokens, seconds = budget.get("tokens"), budget.get("seconds")
    if tokens is not None and seconds is not None:
        raise ConfigError(f"budget.tokens={tokens} and budget.seconds={seconds} exclude each other; give one.")
    if tokens is not None:
        check_range("budget.tokens", tokens, 1)
    if seconds is not None:
        check_range("budget.seconds", seconds, 1)
        if jobs != 1:
            raise ConfigError(
                f"budget.seconds={seconds} with jobs={jobs}: runs that share the machine slow each other down; say "
                "jobs=1, or give budget.tokens."
            )
    seeds = _seeds("seeds", config["seeds"], first=1)
    return Settings(
        seeds=seeds,
        jobs=jobs,
        variants=_variants(config["variants"]),
        dense_ladder=config["dense_ladder"],
        budget_tokens=tokens,
        budget_seconds=seconds,
        sweep=_sweep(config, seeds),
        warm_up=config["warm_up"],
    )


def read_report_settings(config: Mapping[str, Any]) -> ReportSettings:
    """The settings of a report.

    Raises:
        ConfigError: a value that cannot work.
    """
    given = {**_DEFAULT_REPORT, **_mapping("report", config.get("report"), tuple(_DEFAULT_REPORT))}
    check_integer("report.resamples", given["resamples"], 100, 1_000_000)
    check_integer("report.seed", given["seed"], 0)
    metric = check_metric("report.metric", str(given["metric"]), "auto")
    return ReportSettings(metric=metric, resamples=given["resamples"], seed=given["seed"])


def check_name(name: str) -> None:
    """Refuses a variant's name that cannot be that of a folder.

    Raises:
        ConfigError: naming it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"variants.{name}: a name is letters, digits, _ - and ., as in memory_plus_3; rename it.")


def _check_whole(config: Mapping[str, Any]) -> None:
    missing = [key for key in COMPARE_KEYS if key not in config]
    if missing:
        raise ConfigError(f"{missing[0]} was taken out of the configuration; set it to null, or to what it shall be.")


def _seeds(key: str, value: Any, first: int) -> tuple[int, ...]:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{key}=[] leaves nothing to run; give a number of seeds, 1 or more, or a list.")
        for seed in value:
            check_integer(key, seed, 0, 2**32 - 1)
        if len(set(value)) != len(value):
            raise ConfigError(f"{key}={value} names a seed twice; give each once.")
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
        raise ConfigError(f"lr_sweep={rates} is no list of two or more different learning rates, as in [3e-3,6e-3].")
    given = {**_DEFAULT_SWEEP, **_mapping("sweep", config["sweep"], tuple(_DEFAULT_SWEEP))}
    check_integer("sweep.first_seed", given["first_seed"], 0, 2**31)
    check_integer("sweep.data_seed", given["data_seed"], 0, 2**31)
    tried = _seeds("sweep.seeds", given["seeds"], given["first_seed"])
    both = sorted(set(tried) & set(seeds))
    if both:
        raise ConfigError(
            f"seed {both[0]} is of the sweep and of the reported runs, which would then be tuned on what they report; "
            "set sweep.first_seed, or other seeds."
        )
    return SweepSettings(
        learning_rates=tuple(sorted(float(rate) for rate in rates)),
        seeds=tried,
        data_seed=given["data_seed"],
        metric=check_metric("sweep.metric", str(given["metric"])),
    )


def _variants(given: Any) -> dict[str, dict[str, Any]]:
    variants = {}
    for name, overrides in _mapping("variants", given).items():
        check_name(str(name))
        variants[str(name)] = _flat(_mapping(f"variants.{name}", overrides), "")
    return variants


def _flat(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Keys dotted: `+variants.moe.ffn.top_k=2` arrives nested, `+variants.moe={ffn.top_k: 2}` as it stands."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        flat.update(_flat(value, where) if isinstance(value, Mapping) and value else {where: value})
    return flat


def _mapping(key: str, value: Any, allowed: tuple[str, ...] | None = None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} is no mapping; write it as {key}={{KEY: VALUE}}.")
    unknown = [str(name) for name in value if allowed is not None and name not in allowed]
    if unknown:
        raise ConfigError(f"{key}.{unknown[0]} is not known; allowed: {', '.join(allowed or ())}.")
    return {str(name): item for name, item in value.items()}
