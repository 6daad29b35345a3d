"""From a command line to checked variants: the configuration of each is composed and completed before a run starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
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
from pkm_lightning.supervision.external_ranks import started_externally

#: Imported by the process that forks runs: what every run imports that shows its figures in TensorBoard.
PRELOADED = ("pkm_lightning.cli.fit", "torch.utils.tensorboard")
#: Seconds per FLOP of a step with a sparse FFN over those of a dense model: 1.2 to 2.1 among the variants of
#: scripts/results/2026-11-22-facts-ladder; counts until a run of a variant has shown its speed.
_SPARSE = 1.75
# Keys of a configuration on which no compiled kernel depends.
_OF_NO_SHAPE = ("seed", "optim", "callbacks", "logger", "objective", "run_dir", "resume")
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


def is_one_process(config: dict[str, Any]) -> bool:
    """Returns whether a run is a single process on a CPU, and so can be forked: no GPU and no other rank."""
    trainer = config["trainer"]
    is_alone = trainer["devices"] == 1 and trainer["num_nodes"] == 1 and not config["strategy"]
    return is_alone and not started_externally() and _is_on_cpu(config)


def compiled_shape(config: dict[str, Any]) -> str | None:
    """Returns a text that is equal for runs with the same compiled kernels; None where none depends on shapes.

    On CPUs numba's kernels take any size, and training seconds leave out the time of compiling them.
    """
    if _is_on_cpu(config) and not config["model"].get("compile"):
        return None
    parts = {key: value for key, value in config.items() if key not in _OF_NO_SHAPE}
    parts["data"] = {key: value for key, value in config["data"].items() if key not in ("seed", "draw")}
    return json.dumps(parts, sort_keys=True, default=str)


def step_weight(run: ResolvedRun) -> float:
    """Returns the expected seconds per token, relative to other variants: FLOPs, more for a sparse FFN."""
    is_dense = run.config["ffn"]["_target_"].endswith(".Dense") and not run.config.get("extra_ffns")
    return run.cost.train_flops * (1.0 if is_dense else _SPARSE)


def _is_on_cpu(config: dict[str, Any]) -> bool:
    accelerator = config["trainer"]["accelerator"]
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
