"""What `validate`, `test` and `predict` share: the saved configuration, its weights and a Trainer without logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import OmegaConf

from pkm_lightning.build.run import make_callbacks, resolve
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.callbacks.step_progress_bar import StepProgressBar
from pkm_lightning.checkpoints.export import map_checkpoint
from pkm_lightning.checkpoints.latest import latest_checkpoint
from pkm_lightning.checkpoints.mapped import expect_scattered_reads
from pkm_lightning.checkpoints.safetensors import looks_like_safetensors, read_exported
from pkm_lightning.checkpoints.sharded import SavedTensors
from pkm_lightning.checkpoints.tokenizer_check import check_tokenizer
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.cli.job import Job, plain
from pkm_lightning.cli.resume import check_content, checkpoint_config, load_checkpoint, saved_config
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.data.base import tokenizer_digest
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.table_learning import without_fused

#: What a saved run is; a command that evaluates it cannot change it.
_FIXED = ("ffn", "model", "placement", "table", "optim", "seed", "match", "match_budget", "experiment")
#: But where its table lies.
_FREE = ("table.device", "table.shard", "table.group")
_WHERE = ("run_dir", "ckpt", "out", "trust_config", "resume", "format", "file", "overwrite")


class SavedRun:
    """A run read back from `run_dir=` or `ckpt=`, ready to be evaluated.

    Attributes:
        run: the saved configuration, with the command's `data`, `trainer`, `strategy` and `callbacks` on top, resolved.
        folder: the run's directory, or None for a bare checkpoint.

    Raises:
        ConfigError: neither is given, or the command tries to change what the run is.
        CheckpointError: no readable checkpoint.
    """

    def __init__(self, job: Job) -> None:
        self.folder, self.path = locate(job)
        if self.path.is_dir() and OmegaConf.select(job.config, "table.device") == "mmap":
            raise ConfigError(
                f"table.device=mmap needs a checkpoint in one file, and {self.path} is a folder; write one with: "
                f"export ckpt={self.path} file=model.safetensors."
            )
        # A folder's tensors are read when they are needed: of several ranks each reads its parts only.
        checkpoint = load_checkpoint(self.path) if self.path.is_dir() else load_weights(self.path)
        trust = bool(job.config.trust_config)
        if self.folder is not None:
            config = saved_config(self.folder, trust=trust)
        else:
            config = checkpoint_config(checkpoint, str(self.path), trust=trust)
        self._checkpoint = checkpoint
        self.run = resolve(without_fused(_with_overrides(config, job)))
        if self.is_spread and looks_like_safetensors(self.path):
            raise ConfigError(
                f"ckpt={self.path} is read by one process; set strategy=single devices=1, or give a run's checkpoint."
            )
        if self.is_spread and self.run.config["table"].get("device") == "mmap":
            raise ConfigError(
                "table.device=mmap is of one process; set strategy=single devices=1, or table.device=cpu."
            )
        self.run.data.prepare_data()
        check_tokenizer(checkpoint, tokenizer_digest(self.run.data))

    def trainer(self) -> L.Trainer:
        """A Trainer with the callbacks that score and show, without loggers."""
        kept: list[L.Callback] = [c for c in make_callbacks(self.run.config) if isinstance(c, Recall | StepProgressBar)]
        for recall in (c for c in kept if isinstance(c, Recall)):
            recall.path = None  # recall.csv is of the run's own test
        return make_trainer(self.run.config, callbacks=kept, loggers=[])

    @property
    def is_spread(self) -> bool:
        """Several ranks evaluate, each of which reads its own parts of the checkpoint."""
        return bool(self.run.config["strategy"])

    def module(self) -> LanguageModule:
        """The module, with the saved weights where one process evaluates."""
        module = LanguageModule(self.run.config)
        if self.is_spread:
            return module
        module.configure_model()
        if self.path.is_dir():
            self._checkpoint = load_weights(self.path)
        try:
            module.load_state_dict(self._checkpoint["state_dict"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"ckpt={self.path} does not fit its configuration ({reason}).") from None
        for table in module.model.value_tables:
            if table.is_mapped:
                expect_scattered_reads(table.weight)
        return module

    @property
    def ckpt_path(self) -> str | None:
        """What the Trainer is to load, where `module` has no weights yet."""
        return str(self.path) if self.is_spread else None


def load_weights(path: Path) -> dict[str, Any]:
    """The content of a checkpoint in a file or a folder, or of an exported model, without optimizer states to use.

    Tensors in one file stay there until they are read, and cannot be written to.

    Raises:
        CheckpointError: missing, damaged, or not written by this package.
    """
    if path.is_dir():
        return check_content(SavedTensors(path).read_rest(("optimizer_states",)), path)
    return check_content(read_exported(path) if looks_like_safetensors(path) else map_checkpoint(path), path)


def locate(job: Job) -> tuple[Path | None, Path]:
    """The run's directory, None for a bare checkpoint, and the checkpoint that `ckpt=` or `run_dir=` mean.

    Raises:
        ConfigError: neither is given, or `run_dir` is no directory.
        CheckpointError: the run has no checkpoint yet.
    """
    if job.config.ckpt is not None:
        folder = Path(job.config.run_dir) if job.names("run_dir") else None
        return folder, Path(str(job.config.ckpt))
    if not job.names("run_dir"):
        raise ConfigError(f"{job.verb} needs run_dir=RUN_DIRECTORY or ckpt=CHECKPOINT.")
    folder = Path(job.config.run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is no directory; give that of a run.")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"run_dir={folder} has no checkpoint yet; train first, or give ckpt=PATH.")
    return folder, checkpoint


def _with_overrides(saved: dict[str, Any], job: Job) -> dict[str, Any]:
    """The saved configuration with the command's own keys on top."""
    merged = OmegaConf.create(saved)
    for override in job.overrides:
        key = key_of(override)
        root = key.split(".")[0].split("@")[0]
        if root in _FIXED and key not in _FREE:
            raise ConfigError(f"{override}: the saved configuration of a run wins; {root} cannot be changed here.")
        if root in _WHERE:
            continue
        value = OmegaConf.select(job.config, key)
        OmegaConf.update(merged, key, value, force_add=True, merge=False)
    return plain(merged)
