"""Which runs a comparison is made of: arms times seeds, and before them the runs of a learning-rate sweep.

An arm is a variant as it is compared: an FFN with the overrides that are its own. Nothing is composed or built here; a
run is a list of Hydra overrides for `fit` and a directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkm_lightning.compare.overrides import as_overrides, key_of, last_of_each, says
from pkm_lightning.compare.settings import SET_BY_COMPARE, Settings, SweepSettings, check_name
from pkm_lightning.errors import ConfigError

#: Multiples of the dense model's forward FLOPs a token of the trunk.
LADDER = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Arm:
    """A variant that is compared.

    Args:
        name: of its folder and its line in the report.
        overrides: its own, on top of those of all arms.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """A run of an arm.

    Args:
        arm: its name.
        seed: its seed.
        learning_rate: that of a sweep's run; None for a run that is reported.
        overrides: for `fit`, without `run_dir`.
        folder: the run directory.
    """

    arm: str
    seed: int
    learning_rate: float | None
    overrides: tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        """The run in a word or two."""
        tried = "" if self.learning_rate is None else f" lr {self.learning_rate:g}"
        return f"{self.arm}{tried} seed {self.seed}"


def plan_arms(ffns: Sequence[str], settings: Settings) -> list[Arm]:
    """The arms without the ladder: the FFNs that were named, then the variants with an FFN of their own.

    Raises:
        ConfigError: nothing to compare, or a variant that is neither named nor has an FFN.
    """
    arms = [Arm(name, (f"ffn={name}", *as_overrides(settings.variants.get(name, {})))) for name in ffns]
    for name, own in settings.variants.items():
        if name in ffns:
            if "ffn" in own:
                raise ConfigError(f"variants.{name}.ffn={own['ffn']}: ffn= names {name} already; rename the variant.")
            continue
        if not isinstance(own.get("ffn"), str):
            raise ConfigError(
                f"variants.{name} names no FFN: give +variants.{name}={{ffn: memory_plus, ...}}, or name it in ffn=."
            )
        arms.append(Arm(name, (f"ffn={own['ffn']}", *as_overrides({k: v for k, v in own.items() if k != "ffn"}))))
    for arm in arms:
        check_name(arm.name)
        for override in arm.overrides:
            key = key_of(override)
            if key in SET_BY_COMPARE:
                raise ConfigError(
                    f"variants.{arm.name}.{key}: compare sets {key} of each run itself; say {SET_BY_COMPARE[key]}."
                )
        if settings.sweep and says(arm.overrides, "optim.lr"):
            raise ConfigError(f"variants.{arm.name} sets optim.lr, and lr_sweep tries others; leave one of them out.")
    return arms


def dense_arm(arms: Sequence[Arm]) -> Arm:
    """The arm that the ladder is made of: `dense`, with overrides of its own if it is among `arms`.

    Raises:
        ConfigError: a variant of that name has another FFN.
    """
    found = next((arm for arm in arms if arm.name == "dense"), Arm("dense", ("ffn=dense",)))
    if found.overrides[0] != "ffn=dense":
        raise ConfigError(f"variants.dense has {found.overrides[0]}: dense_ladder=true is made of dense; rename it.")
    return found


def ladder_arms(arms: Sequence[Arm], dense_flops: int) -> list[Arm]:
    """`arms` with the dense ladder in the place of `dense`, or before them.

    Args:
        dense_flops: forward FLOPs a token of the trunk of the dense model, which is 1x.
    """
    rungs = [
        Arm(
            f"dense_{factor:g}x",
            (*dense_arm(arms).overrides, "match=flops", f"match_budget={round(factor * dense_flops)}"),
        )
        for factor in LADDER
    ]
    taken = {rung.name for rung in rungs} & {arm.name for arm in arms}
    if taken:
        raise ConfigError(f"dense_ladder=true makes the variant {min(taken)} itself; rename yours.")
    return [*rungs, *(arm for arm in arms if arm.name != "dense")]


def plan_runs(
    arms: Sequence[Arm], settings: Settings, base: Sequence[str], out: Path, rates: Mapping[str, float]
) -> list[PlannedRun]:
    """The runs that are reported, all arms of a seed before the next seed, so that noise of the machine hits all alike.

    Args:
        base: overrides of all arms.
        out: the comparison's directory.
        rates: learning rates that the sweep has chosen.
    """
    runs = []
    for seed in settings.seeds:
        for arm in arms:
            chosen = (f"optim.lr={rates[arm.name]!r}",) if arm.name in rates else ()
            overrides = last_of_each((*base, *arm.overrides, *chosen, f"seed={seed}"))
            runs.append(PlannedRun(arm.name, seed, None, overrides, out / "runs" / arm.name / f"seed-{seed}"))
    return runs


def plan_sweep(
    arms: Sequence[Arm], sweep: SweepSettings, base: Sequence[str], out: Path, data_seeds: Mapping[str, int]
) -> list[PlannedRun]:
    """The runs of a sweep: the same rates and seeds for every arm.

    Args:
        data_seeds: `data.seed` of the reported runs of each arm, where its data have one.
    """
    runs = []
    for rate in sweep.learning_rates:
        for seed in sweep.seeds:
            for arm in arms:
                seeded = arm.name in data_seeds
                other = (f"data.seed={data_seeds[arm.name] + sweep.data_seed}",) if seeded else ()
                overrides = last_of_each((*base, *arm.overrides, *other, f"optim.lr={rate!r}", f"seed={seed}"))
                folder = out / "sweep" / arm.name / f"lr-{rate:g}" / f"seed-{seed}"
                runs.append(PlannedRun(arm.name, seed, rate, overrides, folder))
    return runs


def with_steps(arm: Arm, steps: int, validations: int | None, accumulate: int) -> Arm:
    """The arm with its number of optimizer steps, and so many validations on the way, if that is not None.

    Args:
        accumulate: micro-batches a step, in which Trainers count the way to a validation.
    """
    own: tuple[str, ...] = (f"trainer.max_steps={steps}",)
    if validations is not None:
        own = (*own, f"trainer.val_check_interval={max(1, steps // validations) * accumulate}")
    return replace(arm, overrides=(*arm.overrides, *own))
