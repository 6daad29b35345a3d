"""Several FFN variants in one command: `ffn=a,b,c` is split before Hydra composes, which would take it for a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pkm_lightning.cli.job import searchpath_overrides
from pkm_lightning.errors import ConfigError

_KEY = "ffn="


def split_variants(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line with the first variant alone, and all variants; without a list of them, none.

    Raises:
        ConfigError: an empty name, a name given twice, or two lists.
    """
    named = [a for a in arguments if a.startswith(_KEY)]
    given = [a for a in named if "," in a]
    if not given:
        return list(arguments), []
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} name the FFN more than once; give one ffn=NAME,NAME,...")
    (listed,) = given
    variants = [name.strip() for name in listed.removeprefix(_KEY).split(",")]
    if "" in variants or len(set(variants)) != len(variants):
        raise ConfigError(f"{listed} names a variant twice or leaves a name empty; allowed: ffn=NAME,NAME,...")
    first = f"{_KEY}{variants[0]}"
    return [first if a == listed else a for a in arguments], variants


def compose_variant(variant: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of `variant` with the other `overrides` of the job that is running.

    Raises:
        ConfigError, HydraException: as Hydra finds it.
    """
    others = [override for override in overrides if not override.startswith(_KEY)]
    name = str(HydraConfig.get().job.config_name)
    return compose(name, overrides=[f"{_KEY}{variant}", *others, *searchpath_overrides()])
