"""From a command line to checked variants: the configuration of each is composed and completed before a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.capacity import check_allocatable
from pkm_lightning.cli.assembly import assemble
from pkm_lightning.cli.composition_errors import explain
from pkm_lightning.cli.job import Job, plain, searchpath_overrides
from pkm_lightning.compare.overrides import key_of, last_of_each
from pkm_lightning.compare.schedule import Variant, dense_variant, list_variants, with_ladder
from pkm_lightning.compare.settings import COMPARE_KEYS, SET_BY_COMPARE, Settings
from pkm_lightning.errors import ConfigError, PkmError

# Keys of this command that are not passed on to runs.
_COMMAND_KEYS = (*COMPARE_KEYS, "out", "resume", "format", "ffn", "trust_config")


def base_overrides(job: Job) -> list[str]:
    """Returns the command's overrides that apply to all variants.

    Raises:
        ConfigError: the command sets a key that `compare` sets for each run.
    """
    base = []
    for override in job.overrides:
        key = key_of(override)
        if key in SET_BY_COMPARE:
            raise ConfigError(f"{override}: compare sets {key} of each run itself; {SET_BY_COMPARE[key]}.")
        # `ffn=NAME` chooses variants, but a key inside the group (`ffn.knn=4`) applies to all of them.
        if key.split(".")[0] not in _COMMAND_KEYS or key.startswith("ffn."):
            base.append(override)
    return base


def make_variants(job: Job, settings: Settings, base: Sequence[str]) -> list[Variant]:
    """Returns the variants, with the dense ladder if the settings ask for it.

    Raises:
        ConfigError: there is nothing to compare; see also `list_variants`.
    """
    ffns = job.variants or ([str(o).partition("=")[2] for o in job.overrides if o.startswith("ffn=")])
    variants = list_variants(ffns, settings)
    if settings.dense_ladder:
        # The rungs are multiples of the unmatched dense model's FLOPs, so that `match=` cannot shift the ladder.
        unmatched = Variant("dense_ladder", (*dense_variant(variants).overrides, "match=none"))
        dense = resolve_variant(unmatched, base)
        extras = dense.config.get("extra_ffns")
        if extras:
            raise ConfigError(
                f"dense_ladder=true is of dense FFNs alone, and extra_ffns={','.join(extras)} would be in all of them; "
                "set it per variant, as in +variants.NAME={ffn: FFN, extra_ffns: NAME}."
            )
        variants = with_ladder(variants, dense.cost.trunk_train_flops)
    if not variants:
        raise ConfigError("nothing to compare; name FFNs, ffn=dense,moe,memory_plus, or choose an experiment=.")
    return variants


def resolve_variant(variant: Variant, base: Sequence[str]) -> ResolvedRun:
    """Resolves the configuration of a variant as `fit` would, except for seed and run directory.

    Raises:
        ConfigError: the configuration cannot work; the message starts with the variant's name.
    """
    try:
        overrides = last_of_each((*base, *variant.overrides))
        composed = compose("config", overrides=[*overrides, *searchpath_overrides()])
        with open_dict(composed):
            for key in COMPARE_KEYS:
                composed.pop(key, None)
        resolved = resolve(plain(composed), training=True)
        check_allocatable(resolved.plan, resolved.config)
        assemble(resolved)  # refuses here what would otherwise fail in the run's own process
    except (PkmError, HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"variant {variant.name}: {explain(error)}") from None
    return resolved
