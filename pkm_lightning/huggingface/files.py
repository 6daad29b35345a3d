"""A pretrained model on disk: its architecture and weights, checked before anything is built or read.

Weights are read from safetensors or GGUF only: other formats are pickles, which can run code. No code of a model's
folder is ever run, and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkm_lightning.checkpoints.companions import PLUGGED_TYPE
from pkm_lightning.data.files import expanded
from pkm_lightning.data.pretrained_files import (
    chat_template_of,
    is_gguf,
    pretrained_folder,
    quiet_transformers,
    read_json,
    weights_alone,
)
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError, DataError, missing_extra, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Values of `model_type` whose decoders are those that `PretrainedTransformer` drives.
SUPPORTED = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_KEY = "model.path="
_ADAPTER = "adapter_config.json"
#: Beginnings of the names in files of a bare decoder, as GPT-2 was published.
_PREFIXES = ("", "model.", "transformer.")
#: The number of a layer in the name of a weight, `model.layers.0.mlp.up_proj.weight` or `h.0.attn.c_attn.bias`.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainedFiles:
    """The files of one pretrained model.

    Attributes:
        path: as the user gave it: a folder, or a GGUF file.
        folder: with the files beside the weights; for a GGUF file in the cache.
        architecture: the content of `config.json`.
    """

    path: Path
    folder: Path
    architecture: dict[str, Any]

    @classmethod
    def find(cls, path: str, cache_dir: Path) -> PretrainedFiles:
        """Returns the files of the model at `path`.

        Raises:
            ConfigError: an architecture that is not supported, or transformers is not installed.
            DataError: a file that is missing or damaged.
        """
        source = expanded(path).absolute()
        folder = pretrained_folder(source, cache_dir, _KEY)
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{_KEY}{path} has no config.json; give the folder of a Hugging Face model, or a .gguf file."
            )
        architecture = read_json(folder / "config.json", _KEY)
        check_architecture(architecture, f"{_KEY}{path}")
        files = cls(source, folder, architecture)
        if not is_gguf(source):
            files._shards()
        return files

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, with its chat template; None where the folder has none."""
        file = self.folder / "tokenizer.json"
        return Tokenizer.load(file, _KEY) if file.is_file() else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, or None."""
        return chat_template_of(self.folder)

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer, by the generation config, else by the architecture."""
        file = self.folder / "generation_config.json"
        named = (read_json(file, _KEY) if file.is_file() else {}).get("eos_token_id")
        named = self.architecture.get("eos_token_id") if named is None else named
        return [] if named is None else named if isinstance(named, list) else [named]

    def check_layers(self, n_layers: int) -> None:
        """Refuses safetensors files of another number of layers: built, a false one could fill the memory.

        Raises:
            DataError: as `check_weights`.
            CheckpointError: naming both numbers.
        """
        if is_gguf(self.path):  # read, and so checked, when it was converted
            return
        numbers = {int(match[1]) for name in self._stored() if (match := _LAYER.search(name))}
        if numbers != set(range(len(numbers))) or len(numbers) != n_layers:
            raise CheckpointError(
                f"{_KEY}{self.path}: its files hold {len(numbers)} layers, and config.json asks for {n_layers}; the "
                "weights are those of another model."
            )

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuses safetensors files that lack a weight of `model` (on the meta device), or have it in another shape.

        Raises:
            DataError: a file that is missing, truncated or of another format.
            CheckpointError: naming the first weight that does not fit.
        """
        if is_gguf(self.path):
            return
        found = self._stored()
        for name, parameter in model.named_parameters():
            bare = name.removeprefix(f"{model.base_model_prefix}.")
            shape = next((found[n] for n in (name, *(p + bare for p in _PREFIXES)) if n in found), None)
            if shape != tuple(parameter.shape):
                stored = "is not in its files" if shape is None else f"has the shape {shape} in its files"
                raise CheckpointError(
                    f"{_KEY}{self.path}: the weight {name} {stored}, and config.json asks for "
                    f"{tuple(parameter.shape)}; the weights are those of another model."
                )

    def _stored(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes in the safetensors files, by name."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, tuple[int, ...]] = {}
        for file in self._shards():
            try:
                with safe_open(file, framework="pt") as opened:
                    found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise DataError(
                    f"{_KEY}{self.path}: {file.name} is no whole safetensors file ({reason}); fetch it again."
                ) from None
        return found

    def _shards(self) -> list[Path]:
        """Returns the safetensors files of a folder.

        Raises:
            DataError: there are none, or one of the index is missing.
        """
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        if not index.is_file():
            other = next((file.name for file in sorted(self.path.glob("*.bin"))), None)
            held = f" and {other} is a pickle, which is never opened" if other else ""
            raise DataError(
                f"{_KEY}{self.path} has no model.safetensors{held}; save the model with save_pretrained of "
                "transformers, which writes it."
            )
        names = read_json(index, _KEY).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise DataError(f"{_KEY}{index} has no weight_map from weights to files; fetch it again.")
        # `name`: an index of somebody else's must not name files elsewhere.
        shards = [self.path / Path(name).name for name in sorted(set(names.values()))]
        missing = next((shard.name for shard in shards if not shard.is_file()), None)
        if missing:
            raise DataError(f"{_KEY}{self.path} lacks {missing}, which model.safetensors.index.json names; fetch it.")
        return shards


def check_architecture(architecture: Mapping[str, Any], source: str) -> None:
    """Refuses what `PretrainedTransformer` does not drive.

    Raises:
        ConfigError: naming what is supported.
    """
    kind = architecture.get("model_type")
    if str(kind).startswith(PLUGGED_TYPE):
        raise ConfigError(
            f"{source} is a pretrained model with plugins (model_type={kind!r}), whose folders are for transformers: "
            "load it by AutoModelForCausalLM after import pkm_lightning.huggingface, or use the run that it comes from."
        )
    if kind not in SUPPORTED:
        raise ConfigError(
            f"{source} is of model_type={kind!r}; supported: {', '.join(SUPPORTED)}.{nearest(str(kind), SUPPORTED)}"
        )
    # A saved run holds this content, and saved configurations must name no class and refer to nothing.
    if any(mark in json.dumps(architecture) for mark in ('"_target_"', "${")):
        raise ConfigError(
            f"{source} has _target_ or ${{...}} in its config.json, which no model has; give another one."
        )
    if architecture.get("quantization_config"):
        raise ConfigError(
            f"{source} has quantised weights, which cannot be trained; give the model before it was quantised, or a "
            ".gguf file, whose weights are expanded."
        )


def make_config(architecture: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Returns the configuration of transformers with the content of `config.json`.

    Raises:
        ConfigError: transformers is not installed, or refuses a value.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise missing_extra(source, "transformers", "hf") from None
    check_architecture(architecture, source)
    # Names classes in a file of the model's folder, whose code is not run.
    known = {name: value for name, value in architecture.items() if name != "auto_map"}
    with _refusals(source), quiet_transformers():
        return CONFIG_MAPPING[architecture["model_type"]].from_dict(json.loads(json.dumps(known)))


def make_network(config: PreTrainedConfig, source: str, dtype: Any) -> PreTrainedModel:
    """Returns the model of transformers that `config` describes, with weights that have not been drawn.

    Raises:
        ConfigError: transformers refuses a value.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Drawn weights would all be replaced.
    with _refusals(source), no_init_weights():
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    network.tie_weights()
    return network


@contextlib.contextmanager
def _refusals(source: str) -> Iterator[None]:
    """Turns what transformers raises within the block, of several kinds by value, into one sentence.

    Raises:
        ConfigError: with the reason that transformers gave.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{source} has a config.json that transformers refuses ({type(error).__name__}: {reason:.300})."
        ) from None


def read_model(path: Path, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """Reads the weights at `path` on the CPU, in `dtype`.

    Raises:
        CheckpointError: a file that has changed since it was checked.
    """
    from transformers import AutoModelForCausalLM

    if (path / _ADAPTER).is_file():
        _log.warning("%s holds an adapter (%s), which is not read: merge it into the weights to use it", path, _ADAPTER)
    try:
        with quiet_transformers(), weights_alone(path) as arguments:
            read: Any = AutoModelForCausalLM.from_pretrained(
                **arguments, config=config, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # from the readers of several libraries
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(f"{_KEY}{path} cannot be read ({reason:.300}); fetch it again.") from None
    model: PreTrainedModel = read[0]
    report: dict[str, Any] = read[1]
    if report["missing_keys"]:
        raise CheckpointError(
            f"{_KEY}{path} lacks the weight {min(report['missing_keys'])}; its files are those of another model."
        )
    return model
