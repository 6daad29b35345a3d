"""The contract of a data source: what the package reads from a data module, and what each optional part brings.

A data source is any `LightningDataModule`; it need not inherit from a class of this package. `TokenDataModule`
(`datamodule.py`) implements everything below; a subclass adds where its text comes from.

Required: `train_dataloader()`. A batch is a dict of tensors (B, T): `input_ids` (int64) and `labels` (int64; the token
that follows, or `NO_TARGET`), and optionally `doc_ids` (int64; attention stays within a document, -1 is padding) and
`valid` (bool; False at padding). All ranks make the same number of batches. `check_batch` (`batch_check.py`) refuses
what breaks this in any batch.

| optional member | what it brings |
|---|---|
| `val_dataloader()`, `test_dataloader()` | held-out loss; of equal length on all ranks |
| `predict_dataloader()` | `predict` without `prompt=`: batches with `prompt` (texts) and `index` (-1: a filler) |
| `vocab_size` | `model.vocab_size=auto`, and a refusal of smaller numbers; known before `prepare_data()` |
| `tokenizer`, a `TextCodec` | `predict`, the callbacks `samples` and `recall`, words in the panels of `slot_usage` |
| `tokenizer.digest` | a checkpoint of another tokenizer is refused |
| `recall_items(limit)` | questions for the callback `recall`, and for `samples` where it has no prompts |
| `validation_items(limit)` | questions of validations and `samples`: a choice by them is none by those of the test |
| `own_test` | in run.json: whether the test reads other data than validations, which reports of sweeps mention |
| `n_facts` | `facts` in run.json, from which `compare` derives costs per fact |
| `fact_space`, a `FactSpace` | the bits that a model stores about held-out targets, by the callback `stored_bits` |
| `steps` | optimizer steps that `trainer.max_steps=auto` stands for; known before `prepare_data()` |
| `fingerprint` | `data` in run.json, by which reports notice runs on different data |
| `encode_prompt`, `begin_id`, `chat_template`, ... of `tokenizer` | beginnings of prompts, texts, conversations |
| being a `TokenDataModule` | runs keep tokenizer and held-out data, and are evaluated without the data |
| `endless = True` | no comparison among ranks at every step whether the training data end |
| `state_dict()`, `load_state_dict()` | a resumed run continues with the next batch, not the first (see below) |
| `global_batch_size`, an attribute | `budget.tokens` takes a batch without a Trainer for a whole optimizer step |
| `seq_len`, `global_batch_size` in its YAML | figures of attention cost, memory and traffic that depend on tokens |

Lightning fetches batches ahead, so a position that counts the batches given is wrong in a checkpoint: derive it from
the trainer's optimizer steps (`trainer.global_step`) and the global batch, as the example in `docs/extending.md` does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NO_TARGET", "Batch", "FactSpace", "RecallItem", "TextCodec"]

Batch: TypeAlias = "dict[str, Tensor]"

#: The label of a position that carries no loss, as in `torch.nn.functional.cross_entropy`.
NO_TARGET = -100


class TextCodec(Protocol):
    """The part of a tokenizer that generation and scoring call.

    Optional: `vocab_size` (int), one more than its highest id, added tokens included: no answer has an id beyond it.
    `digest` (str) of its vocabulary; `encode_rendered` and `control_tokens` for `chat`, as in `Tokenizer`.
    `encode_prompt` (str to ids) where prompts begin in a way of their own; `encode_answer` (str to ids) where a space
    and an answer behind a prompt have other ids than they have alone.
    """

    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, without special tokens."""


@dataclass(frozen=True)
class RecallItem:
    """One question of a recall test. The model continues `prompt` with a space, the answer and the end token.

    Attributes:
        prompt: text without a trailing space.
        answer: the right continuation, without the leading space.
        options: 4 distinct answers in random order, the right one among them; empty if there are not so many.
        relation: the kind of question, such as `birth_city`.
        form: `seen`, `paraphrase`, `unseen_template`, `question`, `unseen_question`, `control` or `validation`.
        exposures: times per epoch that training shows the fact, in any form.
        decile: 0 (most shown tenth of the subjects) to 9.
        prior_bits: -log2 of the answer's share among the answers of its relation; nan where unknown.
        majority: whether the answer is the most frequent of its relation, so that guessing finds it.

    Example: `recall_items` in `tests/contributions/data/modular_arithmetic.py`.
    """

    prompt: str
    answer: str
    options: tuple[str, ...]
    relation: str
    form: str
    exposures: int
    decile: int
    prior_bits: float
    majority: bool


@dataclass(frozen=True)
class FactSpace:
    """The sets that names and values of facts were drawn from, uniformly and independently, names without repetition.

    Data that have one give validation and test sequences whose targets are names and values alone: of each document the
    first run of targets is the name, and every further one, behind a position without a target, is a value.

    Attributes:
        people: N, names in the data.
        names: N0, size of the set of names.
        attributes: values per person K.
        values: size of the set that each value was drawn from.
    """

    people: int
    names: int
    attributes: int
    values: int

    @property
    def name_bits(self) -> float:
        """Bits of a name of which nothing is known, log2 N0."""
        return math.log2(self.names)

    @property
    def value_bits(self) -> float:
        """Bits of a value."""
        return math.log2(self.values)

    @property
    def bits(self) -> float:
        """Most bits that a model can store, N (log2(N0 / N) + K log2 S): those of knowing every name and value.

        The order of the names is not part of it, and the set of names has up to 1.44 bits per name more (Stirling).
        """
        return self.people * (math.log2(self.names / self.people) + self.attributes * self.value_bits)


def data_of(trainer: object) -> object:
    """Returns the data module of a Trainer, or None: it has none, or there is no Trainer."""
    return getattr(trainer, "datamodule", None)


def defines(data: object, method: str) -> bool:
    """Returns whether a data module defines a method for which Lightning's base class has a stand-in only.

    These are `train_dataloader` and the other loaders, `state_dict` and `load_state_dict`.
    """
    from lightning import LightningDataModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if isinstance(data, LightningDataModule):
        return is_overridden(method, data, parent=LightningDataModule)
    return hasattr(data, method)


# One accessor per optional member. They use `getattr` and no runtime-checkable Protocol: `isinstance` would evaluate a
# property a second time before Python 3.12, and `fingerprint` and `n_facts` read files.


def vocab_size_of(data: object) -> int | None:
    """Returns the number of token ids that a model must provide for, or that a tokenizer has; None if unknown."""
    return getattr(data, "vocab_size", None)


def tokenizer_of(data: object) -> TextCodec | None:
    """Returns the tokenizer of prepared data, or None."""
    return getattr(data, "tokenizer", None)


def tokenizer_digest(data: object) -> str | None:
    """Returns the hash of all that decides how the data module turns text into ids, or None."""
    return getattr(tokenizer_of(data), "digest", None)


def recall_items_of(data: object, limit: int | None) -> list[RecallItem]:
    """Returns the questions about the data, at most `limit` per form (None: all); none if there is no such method."""
    ask = getattr(data, "recall_items", None)
    return [] if ask is None else ask(limit)


def validation_items_of(data: object, limit: int | None) -> list[RecallItem]:
    """Returns the questions of validations: those of the test where the data have no others."""
    ask = getattr(data, "validation_items", None)
    return recall_items_of(data, limit) if ask is None else ask(limit)


def own_test_of(data: object) -> bool | None:
    """Returns whether the test of prepared data reads other data than validations; None where that is unknown."""
    return getattr(data, "own_test", None)


def n_facts_of(data: object) -> int | None:
    """Returns the number of facts that training shows, or None."""
    return getattr(data, "n_facts", None)


def fact_space_of(data: object) -> FactSpace | None:
    """Returns what the names and values of held-out sequences were drawn from, or None."""
    return getattr(data, "fact_space", None)


def steps_of(data: object) -> int | None:
    """Returns the optimizer steps that the data are made for, or None."""
    return getattr(data, "steps", None)


def fingerprint_of(data: object) -> str | None:
    """Returns the hash of the data and of what is replayed beside them, or None."""
    fingerprint, replay = getattr(data, "fingerprint", None), getattr(data, "replay", None)
    if fingerprint is None or replay is None:
        return fingerprint
    content = [fingerprint, replay.places, fingerprint_of(replay.data)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_endless(data: object) -> bool:
    """Returns whether every rank can always make another training batch."""
    return getattr(data, "endless", False)


def keeps_position(holder: object) -> bool:
    """Returns whether a data module, or a loader, has a state by which a resumed run continues with the next batch."""
    return defines(holder, "state_dict") and defines(holder, "load_state_dict")


def yields_whole_steps(data: object) -> bool:
    """Returns whether a batch is that of a whole optimizer step where there is no Trainer."""
    return hasattr(data, "global_batch_size")


def prompt_ids(tokenizer: TextCodec, prompt: str) -> list[int]:
    """Returns the ids of a prompt, at least one: an empty prompt still needs a token to continue from."""
    encode = getattr(tokenizer, "encode_prompt", None)
    ids: list[int] = tokenizer.encode(prompt) if encode is None else encode(prompt)
    return ids or [tokenizer.eos_id]


def answer_ids(tokenizer: TextCodec, answer: str) -> list[int]:
    """Returns the ids of an answer behind a prompt, the space between them included and the end token not."""
    encode = getattr(tokenizer, "encode_answer", None)
    ids: list[int] = tokenizer.encode(f" {answer}") if encode is None else encode(answer)
    return ids


def begin_ids(tokenizer: TextCodec) -> dict[str, Any]:
    """Returns `begin_id` and `prefix_id`: the ids with which texts of a pretrained model begin, each None for none."""
    return {name: getattr(tokenizer, name, None) for name in ("begin_id", "prefix_id")}


def chat_template_of(tokenizer: object) -> str | None:
    """Returns the Jinja template of conversations that belongs to a tokenizer, or None."""
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


#: What a run lacks whose data module lacks a part, in the order in which users miss it.
_BRINGS = {
    "tokenizer": "no sample answers, recall, predict, generate or chat",
    "val_dataloader": "no held-out loss while training",
    "test_dataloader": "no test after training",
    "state_dict and load_state_dict": "a run that is continued takes its first batch again",
    "fingerprint": "reports do not notice runs on other data",
}


def missing_parts(data: object, loader: object = None) -> str | None:
    """Returns a sentence that names the optional parts which prepared `data` lack, and what a run lacks without them.

    Args:
        data: the data module of a run that is about to train.
        loader: of its training batches, which may keep the position in its place.

    Returns:
        None where there is no data module, or nothing to say.
    """
    if data is None:
        return None
    present = {
        "tokenizer": tokenizer_of(data) is not None,
        "val_dataloader": defines(data, "val_dataloader"),
        "test_dataloader": defines(data, "test_dataloader"),
        "state_dict and load_state_dict": keeps_position(data) or keeps_position(loader),
        "fingerprint": fingerprint_of(data) is not None,
    }
    parts = [f"no {part} ({brings})" for part, brings in _BRINGS.items() if not present[part]]
    if not parts:
        return None
    return f"{type(data).__name__} has {', '.join(parts)}: pkm_lightning/data/base.py lists what each part is."
