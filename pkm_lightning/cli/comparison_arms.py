"""From a command line to checked arms: each arm's configuration is composed and completed before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.cli.assembly import assemble
from pkm_lightning.cli.composition_errors import explain
from pkm_lightning.cli.job import Job, plain, searchpath_overrides
from pkm_lightning.compare.overrides import key_of, last_of_each
from pkm_lightning.compare.plan import Arm, dense_arm, ladder_arms, plan_arms
from pkm_lightning.compare.settings import COMPARE_KEYS, SET_BY_COMPARE, Settings
from pkm_lightning.errors import ConfigError, PkmError

#: Keys of this command that no run is told.
_OF_THE_COMMAND = (*COMPARE_KEYS, "out", "resume", "format", "ffn", "trust_config")


def base_overrides(job: Job) -> list[str]:
    """What the command says to all arms.

    Raises:
        ConfigError: a key that `compare` sets for each run.
    """
    base = []
    for override in job.overrides:
        key = key_of(override)
        if key in SET_BY_COMPARE:
            raise ConfigError(f"{override}: compare sets {key} of each run itself; say {SET_BY_COMPARE[key]}.")
        if key.split(".")[0] not in _OF_THE_COMMAND or key.startswith("ffn."):
            base.append(override)
    return base


def make_arms(job: Job, settings: Settings, base: Sequence[str]) -> list[Arm]:
    """The arms, the dense ladder among them if it was asked for.

    Raises:
        ConfigError: nothing to compare; see `plan_arms`.
    """
    named = job.variants or ([str(o).partition("=")[2] for o in job.overrides if o.startswith("ffn=")])
    arms = plan_arms(named, settings)
    if settings.dense_ladder:
        ladder = arm_config(Arm("dense_ladder", (*dense_arm(arms).overrides, "match=none")), base)
        arms = ladder_arms(arms, ladder.cost.trunk_train_flops)
    if not arms:
        raise ConfigError("nothing to compare; name FFNs, ffn=dense,moe,memory_plus, or choose an experiment=.")
    return arms


def arm_config(arm: Arm, base: Sequence[str]) -> ResolvedRun:
    """The resolved configuration of an arm, as `fit` would have it, but for seed and run directory.

    Raises:
        ConfigError: whatever cannot work, with the arm's name.
    """
    try:
        composed = compose("config", overrides=[*last_of_each((*base, *arm.overrides)), *searchpath_overrides()])
        with open_dict(composed):
            for key in COMPARE_KEYS:
                composed.pop(key, None)
        resolved = resolve(plain(composed), trains=True)
        assemble(resolved)
    except (PkmError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"variant {arm.name}: {explain(error)}") from None
    return resolved
