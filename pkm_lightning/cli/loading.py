"""The model that a command asks: `run_dir=`, `ckpt=` or `model=hf model.path=`, on the command's device."""

from __future__ import annotations

from collections.abc import Collection

import torch
from omegaconf import OmegaConf

from pkm_lightning.build.loading import LoadedModel, load
from pkm_lightning.cli.command_keys import VERBS_OF, is_path_of_extra
from pkm_lightning.cli.evaluation import edits_of, locate, names_pretrained
from pkm_lightning.cli.job import Job
from pkm_lightning.cli.moved_tables import moved_tables
from pkm_lightning.cli.pretrained_run import config_of
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.errors import ConfigError

#: Keys of a command that say which model is asked, and where.
_MODEL_KEYS = (
    *("run_dir", "ckpt", "edits", "trust_config", "out", "table.device", "table.path"),
    *("trainer.accelerator", "trainer.precision"),
)
#: And of a pretrained model.
_PRETRAINED_KEYS = ("model", "model.path", "out", "trainer.accelerator", "trainer.precision", "data.cache_dir")


def load_of_job(job: Job, reads: Collection[str] = ()) -> LoadedModel:
    """Returns the model that the command names.

    Args:
        job: the command.
        reads: keys that the verb reads besides.

    Raises:
        ConfigError: no model is named, or a key that nothing reads is set.
        CheckpointError: as `load`.
    """
    own_keys = tuple(
        key
        for key in (_PRETRAINED_KEYS if names_pretrained(job) else _MODEL_KEYS)
        if job.verb in VERBS_OF.get(key, (job.verb,))
    )
    for override in job.overrides:
        key = key_of(override)
        is_own = key in own_keys or (is_path_of_extra(job.verb, key) and "table.path" in own_keys)
        if not is_own and key.split(".")[0] not in reads:
            allowed = ", ".join((*own_keys, *reads))
            raise ConfigError(f"{override}: {job.verb} does not read {key}; leave it out. It reads: {allowed}.")
    _, weights = locate(job)
    device = device_of(str(OmegaConf.select(job.config, "trainer.accelerator")))
    if names_pretrained(job):
        from pkm_lightning.huggingface.loading import load_pretrained  # imports transformers

        return load_pretrained(config_of(job), device=device)
    table_device, precision = (
        OmegaConf.select(job.config, key) if job.sets(key) else None for key in ("table.device", "trainer.precision")
    )
    return load(
        weights,
        device=device,
        table_device=table_device,
        table_path=moved_tables(job),
        precision=None if precision is None else str(precision),
        trust_config=bool(job.config.trust_config),
        edits=edits_of(job),
    )


def device_of(accelerator: str) -> torch.device:
    """Returns the device that `trainer.accelerator` stands for.

    Raises:
        ConfigError: it is not there, or of a kind that is not offered.
    """
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ConfigError(f"trainer.accelerator={accelerator!r} is not known here; allowed: auto, cpu, gpu, cuda.")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={accelerator}: no CUDA device is at hand; set trainer.accelerator=cpu.")
    return torch.device("cuda")
