"""`compare`: trains variants times seeds, each run in a process of its own, after an equal sweep of learning rates.

The directory `out` holds compare.json, runs/VARIANT/seed-N, sweep/VARIANT/lr-X/seed-N, logs, and the report. The same
command continues an earlier one: finished runs stay, interrupted ones are resumed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pkm_lightning.cli.comparison_director import Director
from pkm_lightning.cli.comparison_variants import base_overrides, make_variants, resolve_variant, step_weight
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.compare.directory import held_directory
from pkm_lightning.compare.overrides import sets_key
from pkm_lightning.compare.processes import STARTED
from pkm_lightning.compare.schedule import Variant
from pkm_lightning.compare.settings import Settings, read_report_settings, read_settings
from pkm_lightning.errors import ConfigError, Interrupted, check_choice
from pkm_lightning.supervision.signals import handled_signals


def run(job: Job) -> None:
    """Runs what is missing and writes the report after each run that ends.

    Raises:
        ConfigError: a setting or a variant cannot work; nothing has been started or written then.
        RunDirectoryError: `out` cannot be used, or some runs ended without results.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP.
    """
    check_choice("resume", str(job.config.resume), STARTED)
    settings, report_settings = read_settings(plain(job.config)), read_report_settings(plain(job.config))
    if job.config.out is None or not str(job.config.out).strip():
        raise ConfigError("out is not set; set it to the comparison's directory, out=DIR.")
    out = Path(str(job.config.out)).absolute()
    base = base_overrides(job)
    variants = make_variants(job, settings, base)
    _check_conflicts(job, settings, variants)
    resolved = {variant.name: resolve_variant(variant, base) for variant in variants}
    configs = {name: run.config for name, run in resolved.items()}
    weights = {name: step_weight(run) for name, run in resolved.items()}
    # The comparison shows progress itself; a run's bar would only fill its log.
    if all("progress_bar" in (config["callbacks"] or {}) for config in configs.values()):
        base = [*base, "~callbacks.progress_bar"]
    with held_directory(out), handled_signals(_interrupt):
        Director(job, settings, report_settings, out, base, variants, configs, weights).direct()


def _check_conflicts(job: Job, settings: Settings, variants: Sequence[Variant]) -> None:
    """Refuses a learning rate next to a sweep, and a budget next to a number of steps.

    Raises:
        ConfigError: both are set.
    """
    if settings.sweep is not None and job.sets("optim.lr"):
        raise ConfigError("optim.lr and lr_sweep both set the learning rate; leave one out, or set lr_sweep=null.")
    if settings.budget_tokens is None and settings.budget_seconds is None:
        return
    with_steps = [variant.name for variant in variants if sets_key(variant.overrides, "trainer.max_steps")]
    if job.sets("trainer.max_steps") or with_steps:
        where = f"variants.{with_steps[0]}.trainer.max_steps" if with_steps else "trainer.max_steps"
        raise ConfigError(f"budget and {where} both set the length of a run; leave one of them out.")


def _interrupt(number: int) -> None:
    """Lets the code that waits for runs stop them in order."""
    # A second signal must not cut short the runs' last checkpoints.
    signal.signal(number, signal.SIG_IGN)
    print("stopping: each run writes a checkpoint", file=sys.stderr)
    raise Interrupted("interrupted; the same command continues", 128 + number)
