"""Several variants in one command: `ffn=a,b,c` is split before Hydra composes, which would read it as a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from pkm_lightning.compare.overrides import as_overrides, last_of_each
from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: The groups that `split_variants` splits, and what a message calls an option of them.
_KINDS = {"ffn": "FFN", "strategy": "strategy"}


def split_variants(arguments: Sequence[str], group: str = "ffn") -> tuple[list[str], list[str]]:
    """Returns the command line with only the first option of `group`, and all of them; none if only one is given.

    Raises:
        ConfigError: an empty name, a repeated name, or two arguments that choose an option of `group`.
    """
    key = f"{group}="
    choices = [argument for argument in arguments if argument.startswith(key)]
    lists = [argument for argument in choices if "," in argument]
    if not lists:
        return list(arguments), []
    if len(choices) > 1:
        raise ConfigError(
            f"{' and '.join(choices)} name the {_KINDS[group]} more than once; set one {key}NAME,NAME,..."
        )
    (names,) = lists
    variants = [name.strip() for name in names.removeprefix(key).split(",")]
    if "" in variants or len(set(variants)) != len(variants):
        raise ConfigError(f"{names} repeats a variant or leaves a name empty; allowed: {key}NAME,NAME,...")
    first = f"{key}{variants[0]}"
    return [first if argument == names else argument for argument in arguments], variants


def side_by_side(
    ffns: Sequence[str], strategies: Sequence[str], of_experiment: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, ...]]:
    """Returns the overrides of each column of `info` by its title; empty for a single one.

    Args:
        ffns: options of `ffn`; empty unless several are named.
        strategies: options of `strategy`; likewise.
        of_experiment: variants as an experiment defines them, which stand for `ffns` where none are named.
    """
    rows: dict[str, tuple[str, ...]] = {ffn: (f"ffn={ffn}",) for ffn in ffns}
    rows = rows or {name: as_overrides(own) for name, own in of_experiment.items()}
    if not strategies:
        return rows
    columns: dict[str, tuple[str, ...]] = {strategy: (f"strategy={strategy}",) for strategy in strategies}
    if not rows:
        return columns
    return {f"{row}, {column}": (*rows[row], *columns[column]) for row, column in product(rows, columns)}


def compose_variant(own: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """Composes the configuration of the current job with the overrides `own` of a variant after its `overrides`.

    Raises:
        ConfigError, HydraException: the configuration does not compose.
    """
    # The command line imports this module for every verb; only a composition needs Hydra.
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from pkm_lightning.cli.job import searchpath_overrides

    name = str(HydraConfig.get().job.config_name)
    return compose(name, overrides=[*last_of_each((*overrides, *own)), *searchpath_overrides()])
