"""`fit init_from=PATH`: a new run from trained weights, with counters and optimizer at zero.

The model may have gained parts: adapters, and variants beside all that was trained. Adapters of the trained run are
merged.

The groups of the architecture are those of the weights unless the command sets them (`cli/saved_overrides.py`), and so
is the tokenizer. Each rank reads its part of the weights, as it does when a run resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from pkm_lightning.build.adapters import merge_adapters
from pkm_lightning.build.gained_parts import gained_variants, rename_for
from pkm_lightning.build.instantiate import check_trusted, target_class
from pkm_lightning.build.loading import find_weights, saved_tokenizer
from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.build.stored_tables import check_stored_rows
from pkm_lightning.build.variants import variants
from pkm_lightning.checkpoints import SavedCheckpoint, later_buffers, open_checkpoint
from pkm_lightning.checkpoints.companions import TOKENIZER, companion_place, find_companion
from pkm_lightning.cli.resume import check_groups, is_missing_tokenizer
from pkm_lightning.data.base import tokenizer_digest
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.strategies.portable import PortableCheckpoints

#: The groups that the weights decide.
ARCHITECTURE = ("placement", "table", "extra_ffns", "ffn", "model")
_WEIGHTS = "state_dict."


class InitialWeights(L.Callback):
    """The weights that a run starts from, loaded before its first step.

    Args:
        path: a run directory, a checkpoint (file or folder), an exported file, or the folder of one.
        trust: whether the configuration that lies with the weights may name classes of other packages.

    Attributes:
        checkpoint: where the weights lie.

    Raises:
        CheckpointError: there are none, they are damaged or quantised.
        ConfigError: the model is made of classes that are not trusted.
    """

    def __init__(self, path: str | Path, *, trust: bool) -> None:
        self._path = Path(path)
        self.checkpoint = open_checkpoint(find_weights(self._path, "init_from="))
        merge_adapters(self.checkpoint)
        config = self.checkpoint.config
        check_groups(config, str(self.checkpoint.path))
        if "bits" in config["table"]:
            raise CheckpointError(
                f"init_from={path} holds a table of {config['table']['bits']} bits per value, which cannot be trained; "
                "start from the checkpoint that it was exported from."
            )
        if not trust:
            check_trusted(self.architecture, str(self.checkpoint.path))

    @property
    def architecture(self) -> dict[str, Any]:
        """The groups of the configuration that the weights decide."""
        return {group: self.checkpoint.config.get(group) for group in ARCHITECTURE}

    @property
    def tokenizer(self) -> str | None:
        """`data.tokenizer` by which data get the tokenizer of the weights; None where it is not known.

        Raises:
            CheckpointError: the file beside the weights is the tokenizer of another model.
        """
        file = find_companion(self.checkpoint.path, TOKENIZER)
        if file is not None:
            saved_tokenizer(self.checkpoint)
            return str(file)
        # A vocabulary that was learned from the data of the training cannot be learned from others.
        saved = self.checkpoint.config["data"].get("tokenizer")
        return saved if isinstance(saved, str) and saved != "bpe" else None

    def check(self, run: ResolvedRun) -> None:
        """Refuses weights that do not fit `run`, damaged ones, and those that the run would replace.

        Raises:
            CheckpointError: naming the first weights or keys that do not fit, or what is damaged.
            ConfigError: they lie in the directory of the run.
        """
        refuse_replaced(self.checkpoint.path, run.config["run_dir"], f"init_from={self._path}")
        gained = rename_for(self.checkpoint, run.model, run.config)
        misfits = self.checkpoint.misfits(run.weight_shapes, later_buffers(run.model, "model.") | gained)
        if misfits:
            raise CheckpointError(
                f"init_from={self._path} does not fit the model of this command ({misfits}); leave out its overrides "
                f"of {', '.join(ARCHITECTURE)} that change shapes."
            )
        self._check_buffer_keys(run.config)
        check_stored_rows(run.model, self.checkpoint)
        self.checkpoint.check_sums(without={n for n in self.checkpoint.shapes if not n.startswith(_WEIGHTS)})

    def _check_buffer_keys(self, config: Mapping[str, Any]) -> None:
        """Refuses keys of plugins that contradict buffers of the weights, which would win without a word."""
        trained = {variant.name: variant.ffn for variant in variants(self.checkpoint.config)}
        for variant in variants(config):
            saved = trained.get(variant.name, {})
            for key in getattr(target_class(variant.ffn, variant.key), "buffer_keys", ()):
                value = variant.ffn.get(key)
                if key in saved and saved[key] != value:
                    ffn = "ffn" if variant.key == "ffn" else f"{variant.key}.ffn"
                    raise CheckpointError(
                        f"{ffn}.{key}={_shown(value)} contradicts the {_shown(saved[key])} of init_from={self._path}, "
                        f"whose weights were learned with it; leave {ffn}.{key} out."
                    )

    def check_tokenizer(self, data: L.LightningDataModule) -> None:
        """Refuses prepared data whose ids mean other words than those of the weights.

        Raises:
            CheckpointError: saying how to set the tokenizer.
        """
        trained, digest = self.checkpoint.skeleton.get("tokenizer"), tokenizer_digest(data)
        if trained is not None and digest is not None and trained != digest:
            raise CheckpointError(
                f"the data's tokenizer is not the one that init_from={self._path} was trained with, so ids would mean "
                f"other words; tokenise them with data.tokenizer={companion_place(self.checkpoint.path, TOKENIZER)} "
                "(for data=tokens and data=mix a key of prepare)."
            )

    def record(self, earlier: Mapping[str, Any] | None) -> dict[str, str]:
        """Returns the path of the weights and their digest, for run.json.

        Args:
            earlier: what an earlier start of the same run has recorded.

        Raises:
            CheckpointError: the weights have changed since.
        """
        made = {"path": str(self.checkpoint.path.absolute()), "digest": _digest(self.checkpoint)}
        if earlier is not None and earlier.get("digest") != made["digest"]:
            raise CheckpointError(
                f"init_from={self._path} has changed since this run started from it, and the run has no checkpoint of "
                "its own yet; restore it, or start again with resume=never."
            )
        return made

    def gained(self, config: Mapping[str, Any]) -> list[str]:
        """Returns the names of the variants that a model of `config` has and the weights lack."""
        return gained_variants(config, self.checkpoint.config)

    @torch.no_grad()
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fills all of the model that was trained. Collective: call on all ranks."""
        rename_for(self.checkpoint, pl_module.model, pl_module.config)  # type: ignore[arg-type]
        if isinstance(trainer.strategy, PortableCheckpoints):
            trainer.strategy.load_model(self.checkpoint)
            return
        state = {f"{_WEIGHTS}{name}": value for name, value in pl_module.state_dict().items()}
        self.checkpoint.read_into({name: state[name] for name in state if name in self.checkpoint.shapes})


def refuse_replaced(path: str | Path, run_dir: str, name: str) -> None:
    """Refuses weights at `path`, called `name`, that lie in the directory of the run.

    Raises:
        ConfigError: naming both.
    """
    if Path(path).resolve().is_relative_to(Path(run_dir).resolve()):
        raise ConfigError(
            f"{name} lies in run_dir={run_dir}, whose files the new run replaces; choose another run_dir."
        )


def start_from_weights(command: dict[str, Any], *, sets_tokenizer: bool) -> dict[str, Any]:
    """Returns the configuration of a new run, with the tokenizer of the weights unless the command sets one.

    Raises:
        CheckpointError, ConfigError: as `InitialWeights`.
    """
    initial, data = InitialWeights(command["init_from"], trust=command["trust_config"]), command["data"]
    if sets_tokenizer or "tokenizer" not in data:
        return command
    tokenizer = initial.tokenizer
    if tokenizer is None:
        return command
    return {**command, "data": {**data, "tokenizer": tokenizer}}


def with_saved_tokenizer(saved: Mapping[str, Any], command: dict[str, Any], *, sets_tokenizer: bool) -> dict[str, Any]:
    """Returns `command` with the tokenizer that a saved run has taken from its weights, unless the command sets one.

    Also where the one that it names is gone, and `saved` has that of the run in its place.
    """
    data = command["data"]
    if sets_tokenizer or not {"tokenizer"} <= data.keys() & saved["data"].keys():
        return command
    if not saved.get("init_from") and not is_missing_tokenizer(data["tokenizer"]):
        return command
    return {**command, "data": {**data, "tokenizer": saved["data"]["tokenizer"]}}


def initial_weights(config: Mapping[str, Any], checkpoint: Path | None) -> InitialWeights | None:
    """Returns what a run starts from that has no `checkpoint` of its own; None if it starts from random weights.

    Raises:
        CheckpointError, ConfigError: as `InitialWeights`.
    """
    if checkpoint is not None or not config.get("init_from"):
        return None
    return InitialWeights(config["init_from"], trust=bool(config.get("trust_config")))


def _digest(checkpoint: SavedCheckpoint) -> str:
    """Returns the SHA-256 of all weights and buffers as they are stored."""
    digest = hashlib.sha256()
    for name in sorted(name for name in checkpoint.shapes if name.startswith(_WEIGHTS)):
        shape, dtype = checkpoint.shapes[name]
        digest.update(f"{name} {tuple(shape)} {dtype}".encode())
        for _, values in sorted(checkpoint.chunks(name), key=lambda chunk: chunk.offsets):
            if values.numel():
                # As bytes, since NumPy has no bfloat16.
                digest.update(values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        checkpoint.forget()
    return digest.hexdigest()


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
