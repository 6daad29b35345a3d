"""Several FFN variants in one command: `ffn=a,b,c` is split before Hydra composes, which would read it as a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_KEY = "ffn="


def split_variants(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the command line with only the first variant, and the names of all; no names if only one is given.

    Raises:
        ConfigError: an empty name, a repeated name, or two `ffn=` arguments.
    """
    choices = [argument for argument in arguments if argument.startswith(_KEY)]
    lists = [argument for argument in choices if "," in argument]
    if not lists:
        return list(arguments), []
    if len(choices) > 1:
        raise ConfigError(f"{' and '.join(choices)} name the FFN more than once; set one ffn=NAME,NAME,...")
    (names,) = lists
    variants = [name.strip() for name in names.removeprefix(_KEY).split(",")]
    if "" in variants or len(set(variants)) != len(variants):
        raise ConfigError(f"{names} repeats a variant or leaves a name empty; allowed: ffn=NAME,NAME,...")
    first = f"{_KEY}{variants[0]}"
    return [first if argument == names else argument for argument in arguments], variants


def compose_variant(variant: str, overrides: Sequence[str]) -> DictConfig:
    """Composes the configuration of `variant` with the other `overrides` of the current job.

    Raises:
        ConfigError, HydraException: the configuration does not compose.
    """
    # The command line imports this module for every verb; only a composition needs Hydra.
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from pkm_lightning.cli.job import searchpath_overrides

    others = [override for override in overrides if not override.startswith(_KEY)]
    name = str(HydraConfig.get().job.config_name)
    return compose(name, overrides=[f"{_KEY}{variant}", *others, *searchpath_overrides()])
