"""The length of a run from a budget of tokens or of seconds, and the short runs that measure speed or compile kernels.

A learning-rate schedule spans the whole run, so the number of steps must be known before a run starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pkm_lightning.compare.live_table import shown_runs
from pkm_lightning.compare.overrides import last_of_each
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.compare.schedule import ScheduledRun, Variant, with_steps
from pkm_lightning.compare.time_left import TimeLeft
from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

#: Optimizer steps whose real tokens are counted; packed sequences differ little from step to step.
SAMPLE = 50
#: Steps of a short run, and of the part at its end that is timed: caches and kernels warm up before.
STEPS, MEASURED = 150, 50
#: Short runs per variant; the median counts.
REPEATS = 3


def steps_of_tokens(budget: float, data: L.LightningDataModule, config: dict[str, Any], *, whole_steps: bool) -> int:
    """Returns the steps that come nearest to `budget` real input tokens, from the first `SAMPLE` steps of the data.

    Args:
        budget: tokens, without padding.
        data: the data module, prepared.
        config: the completed configuration.
        whole_steps: whether a batch is that of a whole step without a Trainer, as of the package's own data modules;
            else it is a micro-batch.

    Raises:
        ConfigError: the budget is less than half a step, or the data give no token.
    """
    data.setup("fit")
    trainer = config["trainer"]
    ranks = trainer["num_nodes"] * (trainer["devices"] if isinstance(trainer["devices"], int) else 1)
    batches = 1 if whole_steps else trainer["accumulate_grad_batches"] * ranks
    tokens = [_real_tokens(batch) for batch in islice(data.train_dataloader(), SAMPLE * batches)]
    if not sum(tokens):
        raise ConfigError(f"budget.tokens={budget:g}: the training data give no token to count; set trainer.max_steps.")
    tokens_per_step = sum(tokens) / len(tokens) * batches
    steps = round(budget / tokens_per_step)
    if steps < 1:
        raise ConfigError(
            f"budget.tokens={budget:g} is less than a step, which has about {tokens_per_step:,.0f} tokens."
        )
    return steps


def _real_tokens(batch: dict[str, Tensor]) -> int:
    valid = batch.get("valid")
    return batch["input_ids"].numel() if valid is None else int(valid.sum())


def measure_speeds(
    variants: Sequence[Variant],
    configs: Mapping[str, dict[str, Any]],
    base: Sequence[str],
    out: Path,
    processes: Processes,
    time_left: TimeLeft,
) -> tuple[dict[str, float], dict[str, str]]:
    """Measures optimizer steps per second of each variant in `REPEATS` short runs.

    Returns:
        The median speed by variant, and the reason by variant where a run failed.
    """
    speeds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    failures: dict[str, str] = {}
    # The variants take turns, so that a slow minute of the machine does not hit one variant alone. The first run of
    # each compiles kernels, which the later ones find cached; the median leaves it out.
    tries = [
        [_short_run(v, configs[v.name], base, out, f"try-{n + 1}", STEPS) for v in variants] for n in range(REPEATS)
    ]
    for planned in tries:
        time_left.plan(processes.to_start(planned), dict.fromkeys(speeds, STEPS), is_short=True)
    for number, planned in enumerate(tries, 1):
        runs = [run for run in planned if run.variant not in failures]
        title = f"short runs that measure the speed, {number} of {REPEATS}"
        ends = {end.run.variant: end.reason for end in _shown(runs, STEPS, title, processes, time_left)}
        for run in runs:
            record = read_record(run.folder)
            rate = (record.get("throughput") or {}).get("steps_per_sec")
            if rate:
                speeds[run.variant].append(float(rate))
            else:
                reason = record.get("reason") or ends.get(run.variant, "")
                failures[run.variant] = f"its speed is not known, callbacks.throughput may be off: {reason}"
        time_left.drop(list(failures))
    return {name: median(rates) for name, rates in speeds.items() if name not in failures}, failures


def warm_up(
    variants: Sequence[Variant],
    configs: Mapping[str, dict[str, Any]],
    base: Sequence[str],
    out: Path,
    processes: Processes,
    time_left: TimeLeft,
) -> None:
    """Runs two steps of each variant, to compile its kernels."""
    runs = [_short_run(variant, configs[variant.name], base, out, "warm-up", 2) for variant in variants]
    # How these runs end does not matter: a variant that fails here fails again in its reported run, with a reason.
    _shown(runs, 2, "warm-up, which compiles kernels", processes, time_left)


def _shown(
    runs: Sequence[ScheduledRun], steps: int, title: str, processes: Processes, time_left: TimeLeft
) -> list[RunEnd]:
    """Runs those that are missing, and shows their progress."""
    to_start = processes.to_start(runs)
    if not to_start:
        return []
    by_variant = {run.variant: steps for run in to_start}
    time_left.plan(to_start, by_variant, is_short=True)
    return list(shown_runs(to_start, to_start, by_variant, title, processes, time_left))


def _short_run(
    variant: Variant, config: Mapping[str, Any], base: Sequence[str], out: Path, name: str, steps: int
) -> ScheduledRun:
    """Returns a run without recall questions: testing an untrained model on them would take minutes."""
    short = with_steps(variant, steps, 1, config["trainer"]["accumulate_grad_batches"])
    extra = [f"trainer.log_every_n_steps={min(MEASURED, steps)}", "seed=0"]
    extra += [f"++trainer.limit_{part}_batches=1" for part in ("val", "test")]
    extra += ["~callbacks.recall"] * ("recall" in (config["callbacks"] or {}))
    overrides = last_of_each((*base, *short.overrides, *extra))
    return ScheduledRun(variant.name, 0, None, overrides, out / "speed" / variant.name / name)
