"""What `validate`, `test` and `predict` share: the saved configuration, its weights, and a Trainer without loggers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import OmegaConf

from pkm_lightning.build.edits import edited
from pkm_lightning.build.loading import check_mappable, load_weights, saved_tokenizer, unread_tensors
from pkm_lightning.build.run import make_callbacks, resolve
from pkm_lightning.build.stored_tables import check_stored_rows
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.callbacks.step_progress_bar import StepProgressBar
from pkm_lightning.callbacks.stored_bits import StoredBits
from pkm_lightning.callbacks.without_table import WithoutTable
from pkm_lightning.checkpoints import later_buffers, latest_checkpoint, open_checkpoint
from pkm_lightning.checkpoints.edit_folder import check_names, read_edits
from pkm_lightning.checkpoints.tokenizer_check import check_tokenizer
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.cli.command_keys import VERBS_OF
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.kept_data import with_kept_data
from pkm_lightning.cli.paths import expanded
from pkm_lightning.cli.places import cache_of
from pkm_lightning.cli.resume import saved_config, saved_config_of, without_fused
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.base import defines, tokenizer_digest
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.training import LanguageModule

#: Keys that make a run what it is; a command that evaluates it cannot change them.
_FIXED = ("ffn", "extra_ffns", "model", "placement", "table", "optim", "seed", "match", "match_budget", "experiment")
#: Except for where its table lies.
_FREE = ("table.device", "table.path", "table.tensor", "table.shard", "table.group")
_KEY_OF_VARIANT = re.compile(r"^extra_ffns\.\w+\.(?=table\.)")


class SavedRun:
    """A run that `run_dir=` or `ckpt=` names, ready to be evaluated.

    Attributes:
        run: the saved configuration, with the command's `data`, `trainer`, `strategy` and `callbacks` on top, resolved.
        folder: the run's directory, or None for a bare checkpoint.
        applied: names of the edits that `module` has applied.

    Raises:
        ConfigError: neither is given, or the command tries to change what the run is.
        CheckpointError: no readable checkpoint.
    """

    applied: Sequence[str] = ()

    def __init__(self, job: Job) -> None:
        self.folder, self.path = locate(job)
        self._edits = edits_of(job)
        self._checkpoint = open_checkpoint(self.path)
        check_mappable(self._checkpoint, OmegaConf.select(job.config, "table.device"))
        trust, cache = bool(job.config.trust_config), cache_of(plain(job.config))
        if self.folder is not None:
            config = saved_config(self.folder, trust=trust, cache=cache)
        else:
            config = saved_config_of(self.path, trust=trust, cache=cache)
        if not job.sets("data.tokenizer"):
            saved_tokenizer(self._checkpoint)  # refused by its own name if it belongs to another model
        fingerprint = self._checkpoint.skeleton.get("data")
        config = with_kept_data(_with_overrides(config, job), self.path, fingerprint, job.verb, job.overrides)
        self.run = resolve(without_fused(config))
        if self.is_spread and self._checkpoint.kind == "exported":
            raise ConfigError(
                f"ckpt={self.path} is read by one process; set strategy=single devices=1, or give a run's checkpoint."
            )
        if self.is_spread and read_edits(self.path, self._edits):
            raise ConfigError(
                f"{self.path} has edits, which are applied in one process; set strategy=single devices=1, or edits=[]."
            )
        if self.is_spread and any(t.is_mapped and t.stored is None for t in self.run.model.value_tables):
            raise ConfigError(
                "table.device=mmap is of one process; set strategy=single devices=1, or table.device=cpu."
            )
        self._checkpoint.check_weights(self.run.weight_shapes, later_buffers(self.run.model, "model."))
        check_stored_rows(self.run.model, self._checkpoint)
        if not self.is_spread:  # else each rank checks its share when the strategy loads it
            self._checkpoint.check_sums(without=unread_tensors(self.run.model, self._checkpoint))
        if job.verb != "predict":  # which may have prompts of its own
            check_dataloader(job.verb, self.run.data)
        self.run.data.prepare_data()
        check_tokenizer(self._checkpoint.skeleton, tokenizer_digest(self.run.data))

    def trainer(self, *, progress: bool = True) -> L.Trainer:
        """Makes a Trainer with the callbacks that score and, if wanted, show progress, without loggers."""
        scorers = (Recall, WithoutTable, StoredBits, *([StepProgressBar] if progress else []))
        callbacks: list[L.Callback] = [c for c in make_callbacks(self.run.config) if isinstance(c, scorers)]
        for recall in (c for c in callbacks if isinstance(c, Recall)):
            recall.path = None  # recall.csv belongs to the test at the end of training
        return make_trainer(self.run.config, callbacks=callbacks, loggers=[])

    @property
    def is_spread(self) -> bool:
        """Whether several ranks evaluate; each then reads its own parts of the checkpoint."""
        return bool(self.run.config["strategy"])

    def module(self) -> LanguageModule:
        """Makes the module, with the saved weights if one process evaluates."""
        module = LanguageModule(self.run.config, weights_follow=True)
        if self.is_spread:
            return module
        module.configure_model()
        load_weights(module.model, self._checkpoint)
        self.applied = list(edited(module.model, self._checkpoint, self._edits).applied)
        return module

    @property
    def ckpt_path(self) -> str | None:
        """Checkpoint that the Trainer is to load, if `module` has no weights yet."""
        return str(self.path) if self.is_spread else None


def names_pretrained(job: Job) -> bool:
    """Returns whether the command names a pretrained model, by `model=hf`, and no run or checkpoint."""
    return (
        not job.sets("run_dir") and not job.sets("ckpt") and OmegaConf.select(job.config, "model._target_") is not None
    )


def edits_of(job: Job) -> list[str] | None:
    """Returns the names or files that `edits=` gives; None: those that are applied.

    Raises:
        ConfigError: it is no list of texts.
    """
    value = OmegaConf.select(job.config, "edits")
    if value is None:
        return None
    edits = plain(OmegaConf.create({"edits": value}))["edits"]
    check_names(edits)
    return [expanded("edits", name) for name in edits]


def locate(job: Job) -> tuple[Path | None, Path]:
    """Returns the run's directory (None without one) and the checkpoint that `ckpt=` or `run_dir=` name.

    Of a pretrained model the path is `model.path`.

    Raises:
        ConfigError: nothing or several of them are given, or `run_dir` is not a directory.
        CheckpointError: the run has no checkpoint yet.
    """
    if names_pretrained(job):
        if OmegaConf.is_missing(job.config.model, "path"):
            raise ConfigError("model.path is not set; give model.path=FOLDER of a Hugging Face model, or a .gguf file.")
        return None, Path(str(job.config.model.path))
    if job.config.ckpt is not None:
        if job.sets("run_dir"):
            raise ConfigError(
                f"run_dir={job.config.run_dir} and ckpt={job.config.ckpt} may be of two runs; give run_dir for the "
                "last checkpoint of a run, or ckpt alone for any other."
            )
        return None, Path(str(job.config.ckpt))
    if not job.sets("run_dir"):
        pretrained = "" if job.verb == "export" else ", or a pretrained model: model=hf model.path=FOLDER_OR_GGUF"
        raise ConfigError(f"{job.verb} needs run_dir=RUN_DIRECTORY or ckpt=CHECKPOINT{pretrained}.")
    folder = Path(job.config.run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is not a directory; set run_dir=DIRECTORY_OF_A_RUN.")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"run_dir={folder} has no checkpoint yet; train first, or give ckpt=PATH.")
    return folder, checkpoint


def check_dataloader(verb: str, data: L.LightningDataModule) -> None:
    """Refuses data without what `verb` reads.

    Raises:
        ConfigError: naming the missing method.
    """
    method = {"validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}[verb]
    if not defines(data, method):
        raise ConfigError(
            f"{verb} reads {method}(), which the data module {type(data).__name__} does not have; add it."
        )


def _with_overrides(saved: dict[str, Any], job: Job) -> dict[str, Any]:
    """Returns the saved configuration with the keys of the command on top."""
    merged = OmegaConf.create(saved)
    for override in job.overrides:
        key = key_of(override)
        root = key.split(".")[0].split("@")[0]
        if root in _FIXED and _KEY_OF_VARIANT.sub("", key) not in _FREE:
            raise ConfigError(f"{override}: the saved configuration of a run wins; {root} cannot be changed here.")
        if root == "run_dir" or root in VERBS_OF:
            continue
        if override.startswith("~"):
            group, _, name = key.rpartition(".")
            (OmegaConf.select(merged, group) if group else merged).pop(name, None)
            continue
        value = OmegaConf.select(job.config, key)
        OmegaConf.update(merged, key, value, force_add=True, merge=False)
    return plain(merged)
