"""Which runs a comparison consists of: variants times seeds.

A variant is an FFN with overrides of its own. Nothing is composed or built here: a run is a list of Hydra overrides for
`fit` and a directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkm_lightning.compare.overrides import as_overrides, key_of, last_of_each, sets_key
from pkm_lightning.compare.settings import SET_BY_COMPARE, Settings, check_name
from pkm_lightning.errors import ConfigError

#: Multiples of the dense model's forward FLOPs per token of the trunk.
LADDER = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Variant:
    """A model that is compared with others.

    Args:
        name: names its folder and its line in the report.
        overrides: its own, applied after those of all variants.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class ScheduledRun:
    """A run of a variant.

    Args:
        variant: the variant's name.
        seed: the run's seed.
        learning_rate: set for runs of a sweep; None for reported runs.
        overrides: for `fit`, without `run_dir`.
        folder: the run directory.
    """

    variant: str
    seed: int
    learning_rate: float | None
    overrides: tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        """Short name of the run for messages."""
        rate = "" if self.learning_rate is None else f" lr {self.learning_rate:g}"
        return f"{self.variant}{rate} seed {self.seed}"


def list_variants(ffns: Sequence[str], settings: Settings) -> list[Variant]:
    """Returns the variants without the dense ladder: first the FFNs in `ffns`, then the variants that name an FFN.

    Raises:
        ConfigError: a variant neither appears in `ffns` nor names an FFN, has a name that cannot be a folder's, sets a
            key that `compare` sets itself, or sets `optim.lr` next to a sweep of it.
    """
    variants = [Variant(name, (f"ffn={name}", *as_overrides(settings.variants.get(name, {})))) for name in ffns]
    for name, values in settings.variants.items():
        if name in ffns:
            if "ffn" in values:
                raise ConfigError(
                    f"variants.{name}.ffn={values['ffn']}: ffn= names {name} already; rename the variant."
                )
            continue
        if not isinstance(values.get("ffn"), str):
            raise ConfigError(
                f"variants.{name} names no FFN: set +variants.{name}={{ffn: memory_plus, ...}}, or name it in ffn=."
            )
        others = {key: value for key, value in values.items() if key != "ffn"}
        variants.append(Variant(name, (f"ffn={values['ffn']}", *as_overrides(others))))
    for variant in variants:
        _check(variant, settings)
    return variants


def _check(variant: Variant, settings: Settings) -> None:
    check_name(variant.name)
    for override in variant.overrides:
        key = key_of(override)
        if key in SET_BY_COMPARE:
            raise ConfigError(
                f"variants.{variant.name}.{key}: compare sets {key} of each run itself; {SET_BY_COMPARE[key]}."
            )
    if settings.sweep and sets_key(variant.overrides, "optim.lr"):
        raise ConfigError(f"variants.{variant.name} sets optim.lr, and lr_sweep tries others; leave one of them out.")


def dense_variant(variants: Sequence[Variant]) -> Variant:
    """Returns the variant that the ladder scales: `dense`, with the overrides that it has among `variants`.

    Raises:
        ConfigError: a variant of that name has another FFN.
    """
    dense = next((variant for variant in variants if variant.name == "dense"), Variant("dense", ("ffn=dense",)))
    if dense.overrides[0] != "ffn=dense":
        raise ConfigError(
            f"variants.dense has {dense.overrides[0]}, but dense_ladder=true needs ffn=dense there; rename the variant."
        )
    return dense


def with_ladder(variants: Sequence[Variant], dense_flops: int) -> list[Variant]:
    """Returns the dense ladder followed by `variants` without `dense`.

    Args:
        variants: all variants.
        dense_flops: forward FLOPs per token of the trunk of the dense model, the rung 1x.

    Raises:
        ConfigError: a variant has the name of a rung, or `dense` another FFN.
    """
    rungs = [
        Variant(
            f"dense_{factor:g}x",
            (*dense_variant(variants).overrides, "match=flops", f"match_budget={round(factor * dense_flops)}"),
        )
        for factor in LADDER
    ]
    clashes = {rung.name for rung in rungs} & {variant.name for variant in variants}
    if clashes:
        raise ConfigError(f"dense_ladder=true adds the variant {min(clashes)} itself; rename yours.")
    return [*rungs, *(variant for variant in variants if variant.name != "dense")]


def schedule_runs(
    variants: Sequence[Variant], settings: Settings, base: Sequence[str], out: Path, rates: Mapping[str, float]
) -> list[ScheduledRun]:
    """Returns the reported runs, seed by seed.

    Args:
        variants: what is compared.
        settings: gives the seeds.
        base: overrides of all variants.
        out: the comparison's directory.
        rates: learning rates that the sweep has chosen, by variant.
    """
    runs = []
    # All variants of a seed come before the next seed, so that a slow hour of the machine affects all variants alike.
    for seed in settings.seeds:
        for variant in variants:
            chosen = (f"optim.lr={rates[variant.name]!r}",) if variant.name in rates else ()
            overrides = last_of_each((*base, *variant.overrides, *chosen, f"seed={seed}"))
            folder = out / "runs" / variant.name / f"seed-{seed}"
            runs.append(ScheduledRun(variant.name, seed, None, overrides, folder))
    return runs


def with_steps(variant: Variant, steps: int, validations: int | None, accumulate: int) -> Variant:
    """Returns the variant with a number of optimizer steps and, unless None, of validations over the run.

    Args:
        variant: what is trained.
        steps: optimizer steps.
        validations: validations over the run; None leaves the interval as configured.
        accumulate: micro-batches per step.
    """
    overrides: tuple[str, ...] = (f"trainer.max_steps={steps}",)
    if validations is not None:
        # Lightning counts the interval between validations in batches, not in optimizer steps.
        overrides = (*overrides, f"trainer.val_check_interval={max(1, steps // validations) * accumulate}")
    return replace(variant, overrides=(*variant.overrides, *overrides))
