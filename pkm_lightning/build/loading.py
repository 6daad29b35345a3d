"""A trained model with its tokenizer, from a run, a checkpoint or an export; no training data are touched.

loaded = pkm_lightning.load("runs/mine")
print(loaded.answer("The capital of France is"))
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkm_lightning.build.edits import EditedTables, edited
from pkm_lightning.build.instantiate import check_trusted
from pkm_lightning.build.model import build_meta_model, build_model, check_foreign_plugins, weight_dtype
from pkm_lightning.build.stored_tables import check_stored_rows, has_digests, with_table_path
from pkm_lightning.build.variants import EXTRAS
from pkm_lightning.capacity.setting import PRECISIONS
from pkm_lightning.checkpoints import SavedCheckpoint, later_buffers, latest_checkpoint, open_checkpoint
from pkm_lightning.checkpoints.companions import (
    CHAT_TEMPLATE,
    MODEL_TYPE,
    TOKENIZER,
    companion_place,
    find_companion,
    model_type_of,
)
from pkm_lightning.checkpoints.edit_folder import check_names
from pkm_lightning.checkpoints.mapped import expect_scattered_reads
from pkm_lightning.checkpoints.tokenizer_check import check_tokenizer
from pkm_lightning.data.base import TextCodec
from pkm_lightning.data.chat_template import ChatTemplate
from pkm_lightning.data.conversations import messages_of
from pkm_lightning.data.files import read_text
from pkm_lightning.data.pretrained_files import is_gguf
from pkm_lightning.data.prompts import Prompt
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer
from pkm_lightning.errors import CheckpointError, ConfigError, check_choice
from pkm_lightning.inference.generation import Answer, generate
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

#: The groups of a configuration that a model is built from.
_MODEL_GROUPS = ("model", "ffn", "extra_ffns", "placement", "table", "finetune")


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked, and what belongs to it.

    Attributes:
        model: in evaluation mode, on `device`.
        tokenizer: the meaning of its ids; None where no `tokenizer.json` lies beside the weights.
        config: the configuration that it was trained with.
        path: of the checkpoint or exported file.
        device: of the model.
        context: tokens per sequence in training; None where the data module has no such key.
        chat_template: Jinja text that renders a conversation, as in a Hugging Face folder; None for most models.
        tokens_seen: tokens that it was trained on.
        edits: its tables with the edits that are applied; None for a pretrained model.

    Example: `docs/trained-models.md`, "From a program".
    """

    model: Transformer
    tokenizer: TextCodec | None
    config: dict[str, Any]
    path: Path
    device: torch.device
    context: int | None = None
    chat_template: str | None = None
    tokens_seen: int = 0
    edits: EditedTables | None = None

    def __repr__(self) -> str:
        return f"LoadedModel({str(self.path)!r}, {self.tokens_seen:,} tokens seen, device={str(self.device)!r})"

    def generate(self, prompts: Sequence[Prompt], **sampling: Any) -> list[list[Answer]]:
        """Returns the answers to each prompt, a text or a conversation; the keywords are those of `Sampling`.

        Raises:
            CheckpointError: there is no tokenizer.
            ConfigError: `prompts` is no list of them, no template renders them, or a keyword is out of its range.
            DataError: a message lacks `role` or `content`.
        """
        codec = self.codec()
        if isinstance(prompts, str) or not all(isinstance(prompt, str | list) for prompt in prompts):
            raise ConfigError(f"prompts={prompts!r:.60} is no list of texts; give [TEXT, ...], or one TEXT to answer.")
        rendered, end_ids = self.rendered(prompts)
        return generate(self.model, codec, rendered, Sampling(**sampling), device=self.device, end_ids=end_ids)

    def answer(self, prompt: Prompt, **sampling: Any) -> str:
        """Returns the first answer to one prompt, such as [{"role": "user", "content": TEXT}]; else as `generate`."""
        ((first, *_),) = self.generate([prompt], **sampling)
        return first.text.strip()

    def rendered(
        self, prompts: Sequence[Prompt], context: int | None = None
    ) -> tuple[list[str | list[int]], list[int]]:
        """Returns the prompts with the ids of conversations in the model's template, and the tokens that end answers.

        Raises:
            ConfigError: there is no template, it refuses a conversation, or one has more tokens than `context`.
            DataError: a message lacks `role` or `content`.
        """
        if all(isinstance(prompt, str) for prompt in prompts):
            return [prompt for prompt in prompts if isinstance(prompt, str)], []
        if self.chat_template is None:
            raise ConfigError(f"{self.path} has no chat template for messages; give texts.")
        template = ChatTemplate(self.chat_template, self.codec(), self.path)
        rendered: list[str | list[int]] = []
        for number, prompt in enumerate(prompts, 1):
            if isinstance(prompt, str):
                rendered.append(prompt)
                continue
            ids = template.encode(messages_of(f"prompt {number}", {"messages": prompt}, "messages"))
            if context is not None and len(ids) > context:
                raise ConfigError(
                    f"prompt {number} has {len(ids)} tokens, and the model was trained on sequences of {context}; "
                    "shorten it, or set extrapolate=true to read on at positions beyond those of training."
                )
            rendered.append(ids)
        return rendered, template.end_ids()

    def codec(self) -> TextCodec:
        """Returns the tokenizer.

        Raises:
            CheckpointError: there is none.
        """
        if self.tokenizer is None:
            module = str(self.config["data"].get("_target_"))
            way = (
                " (fit with resume=always writes it into a run whose data are at hand)"
                if module.startswith("pkm_lightning.")
                else f", if {module} has one of this kind; one of its own is used by predict with the run's data"
            )
            raise CheckpointError(
                f"{self.path} has no {TOKENIZER} beside it, without which its ids mean no words; put that of the "
                f"training at {companion_place(self.path, TOKENIZER)}{way}."
            )
        return self.tokenizer


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    table_device: str | None = None,
    table_path: str | Path | Mapping[str, str | Path] | None = None,
    precision: str | None = None,
    trust_config: bool = False,
    edits: Sequence[str | Path] | None = None,
) -> LoadedModel:
    """Returns the model of a run directory, a checkpoint, an export, or a folder or GGUF file of a pretrained model.

    Args:
        path: a run directory stands for its last checkpoint.
        device: where the model goes.
        table_device: `auto`, `cpu` or `mmap`, as `table.device`; None for that of the training.
        table_path: where the rows of a frozen table lie now, as `table.path`, or places by variant, such as
            {"engram": FILE} for an entry of `extra_ffns`; None for where they lay in training.
        precision: of the weights, as `trainer.precision`; None for that of the training. Nothing is cast within the
            forward, so that `bf16-mixed` is the same as `32-true`.
        trust_config: whether the checkpoint may name classes of other packages.
        edits: names of edits of these weights, or their files; None: those that are applied, [] none.

    Raises:
        CheckpointError: missing, damaged, not of this package, with an edit of other weights, or beside a tokenizer of
            another model.
        ConfigError: an argument that is not known, or a class that is not trusted.

    Example: `docs/trained-models.md`, "From a program".
    """
    _check_device(device)
    if is_pretrained(Path(path)):
        _refuse_edits(path, edits)
        # A room above this one, reached when it is needed: it imports transformers.
        room = importlib.import_module("pkm_lightning.huggingface.loading")
        pretrained: LoadedModel = room.load_path(Path(path), device=device, precision=precision)
        return pretrained
    weights = find_weights(Path(path))
    checkpoint = open_checkpoint(weights)
    check_mappable(checkpoint, table_device)
    config = checkpoint.config
    if not trust_config:
        check_trusted({group: config.get(group) for group in _MODEL_GROUPS}, str(weights))
    if table_device is not None:
        config = with_table_device(config, table_device)
    config = with_table_path(config, table_path)
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
        config = {**config, "trainer": {**config["trainer"], "precision": precision}}
    shapes = build_meta_model(config)
    check_foreign_plugins(shapes, config)
    expected = {f"model.{name}": tuple(value.shape) for name, value in shapes.state_dict().items()}
    checkpoint.check_weights(expected, later_buffers(shapes, "model."))
    check_stored_rows(shapes, checkpoint)
    checkpoint.check_sums(without=unread_tensors(shapes, checkpoint))
    with weight_dtype(config), torch.device(device):
        model = build_model(config)
    load_weights(model, checkpoint)
    template = find_companion(weights, CHAT_TEMPLATE)
    return LoadedModel(
        model.eval(),
        saved_tokenizer(checkpoint),
        config,
        weights,
        torch.device(device),
        context_of(config),
        None if template is None else read_text(template),
        int(checkpoint.skeleton["tokens_seen"]),
        edited(model, checkpoint, edits),
    )


def _refuse_edits(path: str | Path, edits: Sequence[str | Path] | None) -> None:
    """Refuses edits of a pretrained model."""
    if edits:
        check_names(edits)
        raise ConfigError(
            f"edits={','.join(map(str, edits))}: {path} is pretrained and has no rows to edit; leave edits out."
        )


def with_table_device(config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Returns `config` with `table.device` for the tables of all variants but those in a file of their own."""
    moved = {**config, "table": {**config["table"], "device": device}}
    extras = {}
    for name, extra in (config.get(EXTRAS) or {}).items():
        table = dict(extra.get("table") or {})
        if table.get("path") is None or table.get("trainable", True):
            table.pop("device", None)
        extras[name] = {**extra, "table": table}
    return {**moved, EXTRAS: extras} if extras else moved


def is_pretrained(path: Path) -> bool:
    """Returns whether `path` is a model for `model=hf`: a GGUF file, or a folder of a class of transformers."""
    return is_gguf(path) or model_type_of(path) not in (None, MODEL_TYPE)


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={str(device)!r} is not at hand ({reason:.60}); allowed: cpu, cuda, cuda:0."
        ) from None


def find_weights(path: Path, key: str = "") -> Path:
    """Returns the checkpoint or exported file that `path`, which may be a run directory or a folder, stands for.

    Args:
        path: as `load` takes it.
        key: what the path is called in messages, such as `init_from=`.

    Raises:
        CheckpointError: it does not exist, or stands for none or several.
    """
    if not path.exists():
        raise CheckpointError(f"{key}{path} does not exist; give a run, a checkpoint or an exported model.")
    if not path.is_dir() or (path / ".metadata").exists():
        return path
    if (path / "config.yaml").is_file():
        latest = latest_checkpoint(path)
        if latest is None:
            raise CheckpointError(f"{key}{path} has no checkpoint yet; train it first, or give another path.")
        return latest
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:3]) or "no .safetensors file"
        raise CheckpointError(
            f"{key}{path} is no run directory and holds {names}; give a run, a checkpoint or an exported model."
        )
    return files[0]


def saved_tokenizer(checkpoint: SavedCheckpoint) -> Tokenizer | None:
    """Returns the tokenizer that lies beside a checkpoint, or None; that of bytes needs no file.

    Raises:
        CheckpointError: it is not the one that the weights were trained with.
        DataError: it cannot be read.
    """
    file = find_companion(checkpoint.path, TOKENIZER)
    if file is None:
        of_bytes = bytes_tokenizer()
        return of_bytes if checkpoint.skeleton.get("tokenizer") == of_bytes.digest else None
    tokenizer = Tokenizer.load(file)
    try:
        check_tokenizer(checkpoint.skeleton, tokenizer.digest)
    except CheckpointError:
        raise CheckpointError(
            f"{file} is not the tokenizer that {checkpoint.path.name} was trained with, so ids would mean other "
            "words; put the right one there, or move the weights to a folder of their own."
        ) from None
    return tokenizer


def context_of(config: Mapping[str, Any]) -> int | None:
    """Returns the tokens per sequence of the training, of a pretrained model those of its own training, or None."""
    architecture = config["model"].get("architecture") or {}
    length = architecture.get("max_position_embeddings", architecture.get("n_positions"))
    length = config["data"].get("seq_len") if length is None else length
    return length if isinstance(length, int) else None


def load_weights(model: Transformer, checkpoint: SavedCheckpoint) -> None:
    """Fills `model`; mapped tables stay in the file."""
    state = checkpoint.map(without=("optimizer_states",))["state_dict"]
    try:
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path} does not fit its configuration ({reason}).") from None
    for table in model.value_tables:
        if table.is_mapped and table.stored is None:
            for stored in table.state_dict().values():
                expect_scattered_reads(stored)


def unread_tensors(model: Transformer, checkpoint: SavedCheckpoint) -> set[str]:
    """Returns the names of tensors that no evaluation reads, or of which it reads a few rows only."""
    tables = [(name, m) for name, m in model.named_modules() if isinstance(m, ValueTable) and m.is_mapped]
    mapped = {f"state_dict.model.{name}.{part}" for name, table in tables for part in table.state_dict()}
    return mapped | {name for name in checkpoint.shapes if name.startswith("optimizer_states.")}


def check_mappable(checkpoint: SavedCheckpoint, table_device: str | None) -> None:
    """Refuses `table.device=mmap` for a checkpoint of several ranks, whose rows lie in several files.

    Raises:
        ConfigError: naming the export that can be mapped.
    """
    path = checkpoint.path
    if checkpoint.kind == "folder" and table_device == "mmap" and not has_digests(checkpoint):
        raise ConfigError(
            f"table.device=mmap needs a checkpoint in one file, and {path} is a folder; write one with: "
            f"export ckpt={path} file=model.safetensors."
        )
