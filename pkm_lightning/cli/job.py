"""One Hydra job: its run directory, and a command line that Lightning can start the other ranks with.

Lightning starts ranks 1, 2, ... by running `sys.argv` again. The command line that Hydra was given cannot serve for it:
the verb has been split off, `-m` would start the whole sweep in every rank, and a time in the name of the run directory
differs between ranks.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import pkm_lightning.configs
from pkm_lightning.cli.command_keys import check_read
from pkm_lightning.cli.composition_errors import explain
from pkm_lightning.cli.paths import with_expanded_paths
from pkm_lightning.cli.saved_overrides import is_of_saved_run, is_saved_choice
from pkm_lightning.compare.overrides import key_of, quoted, sets_key
from pkm_lightning.compare.settings import COMPARE_KEYS
from pkm_lightning.errors import ConfigError, Interrupted, PkmError

_RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@dataclass(frozen=True)
class JobFailure:
    """The end of a job that did not succeed: what to print, and the exit code."""

    message: str
    exit_code: int


class Job:
    """A composed configuration together with where it came from.

    Args:
        verb: the verb under way.
        arguments: the command line after the verb.
        config: the composed configuration; its `run_dir` becomes absolute.
        variants: names of several FFNs, where the verb takes them; `config` is that of the first.
        given: the command line as the user typed it, with all of those names.
        strategies: names of several strategies, likewise.

    Attributes:
        comparison: keys of a comparison that an experiment sets, where the verb makes none.
        config: the same, struct-locked.
        arguments, given: the command line after the verb.
        overrides: the user's task overrides of this job, as `KEY=VALUE` texts.
        is_on_saved: whether `config` is the saved configuration of a run with these on top.
    """

    def __init__(
        self,
        verb: str,
        arguments: list[str],
        config: DictConfig,
        variants: Sequence[str] = (),
        given: Sequence[str] = (),
        strategies: Sequence[str] = (),
    ) -> None:
        self.verb, self.config, self.variants, self.strategies = verb, config, list(variants), list(strategies)
        self.arguments, self.given = arguments, list(given or arguments)
        hydra = HydraConfig.get()
        task = list(hydra.overrides.task)
        self.overrides = [override for override in task if not is_saved_choice(override)]
        self.is_on_saved = any(map(is_of_saved_run, task))
        # A saved configuration holds `trainer.devices`, which `devices` is an alias of.
        if self.sets("devices") and not self.sets("trainer.devices"):
            self.overrides.append(f"trainer.devices={config.trainer.devices}")
        self.comparison = _leave_comparison(self)
        check_read(verb, self.overrides, config)
        swept = hydra.mode == RunMode.MULTIRUN
        with open_dict(config):
            for key in ("run_dir", "init_from", "ckpt", "file", "dir", "out", "packages"):
                if key not in config:
                    continue
                value = config[key]
                # Hydra takes the name 2024 for a number.
                if value is not None and not isinstance(value, str):
                    typed = next((o.partition("=")[2] for o in self.overrides if key_of(o) == key), value)
                    raise ConfigError(f"{key}={typed} is not text; quote it: \"{key}='{typed}'\".")
                config[key] = with_expanded_paths(value, key)
            if config.init_from is not None:  # saved, and the run may be continued from elsewhere
                config.init_from = str(Path(config.init_from).absolute())
            if config.run_dir is None:
                raise ConfigError("run_dir=null names no directory; give run_dir=PATH.")
            run_dir = str(hydra.runtime.output_dir) if swept else config.run_dir
            config.run_dir = str(Path(run_dir).absolute())

    def sets(self, key: str) -> bool:
        """Returns whether the command line sets `key`."""
        return sets_key(self.overrides, key)

    def execute(self, run: Callable[[Job], float | None], failures: list[JobFailure]) -> float | None:
        """Runs the verb; an error of the user's is kept for the end, so that the other jobs of a sweep still run."""
        before = {name: os.environ.get(name) for name in _RANK_VARIABLES}
        sys.argv = self._rank_command()
        quieten_libraries()  # once more: Lightning sets the level of its log when it is imported
        try:
            self._check_external_launch(before)
            return run(self)
        except (PkmError, OSError) as error:
            failures.append(JobFailure(explain(error), getattr(error, "exit_code", 2)))
        except Interrupted as stop:
            failures.append(JobFailure(str(stop), stop.exit_code))
            asked_to_stop = stop.exit_code > 128
            if asked_to_stop and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise KeyboardInterrupt from None
        finally:
            _leave_process_group(before)
        return None

    def _check_external_launch(self, environment: dict[str, str | None]) -> None:
        external = environment["RANK"] is not None or environment["LOCAL_RANK"] is not None
        external = external or os.environ.get("SLURM_NTASKS", "1") != "1"
        if self.verb == "fit" and external and not self.sets("run_dir"):
            raise ConfigError(
                "run_dir is not set; ranks that were started externally need run_dir=PATH to agree on one."
            )

    @property
    def flags(self) -> list[str]:
        """Hydra's flags that name where configurations lie, for another command like this one."""
        given = get_args_parser().parse_args(self.arguments)
        names = [name for name in ("config_dir", "config_path", "config_name") if getattr(given, name)]
        return [*(f"--{name.replace('_', '-')}={getattr(given, name)}" for name in names), *searchpath_overrides()]

    def _rank_command(self) -> list[str]:
        overrides = [o for o in self.overrides if o.split("=")[0] != "run_dir"]
        # Verbs other than fit would take the default directory, named after the time, for that of a trained run.
        directory = (
            [f"run_dir={quoted(str(self.config.run_dir))}"] if self.verb == "fit" or self.sets("run_dir") else []
        )
        return [sys.argv[0], self.verb, *self.flags, *overrides, *directory]


def searchpath_overrides() -> list[str]:
    """Returns what the command line adds to Hydra's search path, for another composition like this one."""
    return [o for o in HydraConfig.get().overrides.hydra if o.lstrip("+").startswith("hydra.searchpath")]


def _leave_comparison(job: Job) -> dict[str, Any]:
    """Removes and returns the keys of a comparison, which an experiment sets, from a `job` whose verb makes none.

    Raises:
        ConfigError: the command line sets one of them.
    """
    if job.verb in ("compare", "report"):
        return {}
    removed = {}
    with open_dict(job.config):
        for key in COMPARE_KEYS:
            if key in job.config and any(key_of(o).split(".")[0] == key for o in job.overrides):
                raise ConfigError(f"{key} is for compare, not for {job.verb}; leave it out.")
            if key in job.config:
                removed[key] = job.config.pop(key)
    return plain(OmegaConf.create(removed))


def plain(config: DictConfig) -> dict[str, Any]:
    """Returns the configuration as plain dicts and lists, with interpolations resolved and paths expanded.

    Raises:
        ConfigError: a mandatory value (`???`) was not given, another key refers to one that was deleted, or a path is
            empty.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} is not set; give it as {missing[0]}=VALUE{_meaning(missing[0], config)}.")
        # Plain types only: a checkpoint that holds an OmegaConf object is refused by torch.load(weights_only=True).
        container = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    return {str(key): value for key, value in with_expanded_paths(container).items()}


def _meaning(key: str, config: DictConfig) -> str:
    """Returns in brackets the comment on a mandatory `key` in the YAML of its class; empty where there is none."""
    parent, _, leaf = key.rpartition(".")
    group = OmegaConf.select(config, parent, throw_on_missing=False) if parent else None
    target = group.get("_target_") if isinstance(group, DictConfig) and "_target_" in group else None
    for file in Path(pkm_lightning.configs.__file__).parent.glob("*/*.yaml") if target else ():
        text = file.read_text(encoding="utf-8")
        comment = re.search(rf"^\s*{leaf}: \?\?\? +# (.+)$", text, re.MULTILINE)
        if comment and f"_target_: {target}" in text:
            return f" ({comment[1]})"
    return ""


#: Warnings of libraries about each other's names, or about what this package does by other means.
_IRRELEVANT_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    "Checkpoint directory .* exists and is not empty",
    r".*torch\.distributed\..* is deprecated",
    ".*`broadcast_buffers` is deprecated.*",
    ".*DeepSpeed handles gradient clipping internally.*",
)


def quieten_libraries() -> None:
    """Suppresses Lightning's tips, deprecations inside libraries, and warnings about the files of a resumed run."""
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The first warns of every default in a task's YAML, the second repeats each attempt to reach the network, and the
    # third warns that an experiment is new.
    for name in ("lm_eval", "huggingface_hub", "lightning.pytorch.loggers.mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def log_to_stderr() -> None:
    """Leaves the standard output to what a program reads there."""
    for handler in logging.getLogger().handlers:
        # Not its subclass, which writes to a file.
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)


def _leave_process_group(before: dict[str, str | None]) -> None:
    """Lets the next job of a sweep start its own process group; variables that were set before stay."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
