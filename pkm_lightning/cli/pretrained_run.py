"""A pretrained model that `model=hf` names, evaluated as it is, on the data of the command."""

from __future__ import annotations

from typing import Any

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.command_keys import TOP_KEYS
from pkm_lightning.cli.evaluation import SavedRun, check_dataloader, edits_of, locate, names_pretrained
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.data.datamodule import TokenOptions
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import LanguageModule


class PretrainedRun(SavedRun):
    """The configuration of the command, with the weights of `model.path`.

    Raises:
        PkmError: files that are missing, damaged or not supported, or data that do not fit.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self.path = locate(job)
        self.run = resolve(_with_prompts_only(config_of(job), job))
        if job.verb != "predict":  # which may have prompts of its own
            check_dataloader(job.verb, self.run.data)
        self.run.data.prepare_data()

    def module(self) -> LanguageModule:
        """Makes the module; the Trainer has it read the weights."""
        return LanguageModule(self.run.config)

    @property
    def ckpt_path(self) -> None:
        """None: no checkpoint is loaded."""
        return None


def evaluated_run(job: Job) -> SavedRun:
    """Returns the run or the pretrained model that `job` evaluates.

    Raises:
        PkmError: as `SavedRun` and `PretrainedRun`.
    """
    if not names_pretrained(job):
        return SavedRun(job)
    if edits := edits_of(job):
        raise ConfigError(
            f"edits={','.join(edits)}: edits are of runs and exported files, not of model=hf; leave them out."
        )
    return PretrainedRun(job)


def config_of(job: Job) -> dict[str, Any]:
    """Returns the configuration of the command without the keys of its verb."""
    return {key: value for key, value in plain(job.config).items() if key in TOP_KEYS}


def _with_prompts_only(config: dict[str, Any], job: Job) -> dict[str, Any]:
    """Replaces the data of `predict`, which reads nothing but prompts, unless the command names some."""
    named = any(override.startswith(("data=", "data@")) for override in job.overrides)
    if job.verb != "predict" or named or not TokenOptions.__required_keys__ <= config["data"].keys():
        return config
    options = {key: value for key, value in config["data"].items() if key in TokenOptions.__annotations__}
    return {**config, "data": {"_target_": "pkm_lightning.data.HeldOutDataModule", "folder": None, **options}}
