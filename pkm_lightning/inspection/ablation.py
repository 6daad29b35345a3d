"""What a model would expect without some slots: losses, next tokens, and the share of questions that it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pkm_lightning.data.base import RecallItem, TextCodec, prompt_ids
from pkm_lightning.inference.recall import score_items
from pkm_lightning.inspection.expectations import expectations
from pkm_lightning.inspection.foreign import codec_of, trunk_of
from pkm_lightning.inspection.masking import SlotChoice, checked_choice, mask
from pkm_lightning.inspection.record import AblationRecord, Record
from pkm_lightning.inspection.slot_sets import inspected_readers, slot_sets
from pkm_lightning.inspection.windows import DEFAULT_CONTEXT, Pieces

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


def ablate(
    model: Transformer | nn.Module,
    tokenizer: TextCodec | Any,
    text: str | Sequence[str],
    slots: SlotChoice,
    *,
    context: int | None = None,
    questions: Sequence[RecallItem] = (),
) -> AblationRecord:
    """Returns losses and next tokens of texts with all reads and without those of some slots.

    Args:
        model, tokenizer: as for `trace`.
        text: what to read.
        slots: as `mask` takes them.
        context: as in `trace`.
        questions: of which the share is reported that greedy answers give, both ways.

    Raises:
        ConfigError: a set or a slot that the model does not have.

    Example: `docs/inspecting.md`.
    """
    model, tokenizer = trunk_of(model), codec_of(tokenizer)
    texts = [text] if isinstance(text, str) else list(text)
    encoded = [prompt_ids(tokenizer, one) for one in texts]
    return _ablated(model, tokenizer, encoded, slots, context, questions)


def add_ablation(
    record: Record,
    model: Transformer | nn.Module,
    tokenizer: TextCodec | Any,
    slots: SlotChoice,
    *,
    context: int | None = None,
    questions: Sequence[RecallItem] = (),
) -> None:
    """Appends to `record.ablations` what the record's texts would be without some slots; else as `ablate`."""
    model, tokenizer = trunk_of(model), codec_of(tokenizer)
    texts = [[token for token, _ in text.tokens] for text in record.texts]
    record.ablations.append(_ablated(model, tokenizer, texts, slots, context, questions))


def _ablated(
    model: Transformer,
    tokenizer: TextCodec,
    texts: Sequence[Sequence[int]],
    slots: SlotChoice,
    context: int | None,
    questions: Sequence[RecallItem],
) -> AblationRecord:
    choice = checked_choice(slot_sets(inspected_readers(model)), slots)
    pieces, length = Pieces(tokenizer), DEFAULT_CONTEXT if context is None else context
    whole = [expectations(model, pieces, ids, context=length) for ids in texts]
    recall = _recall(model, tokenizer, questions)
    with mask(model, choice):
        without = [
            expectations(model, pieces, ids, before.scored, context=length)
            for ids, before in zip(texts, whole, strict=True)
        ]
        recall_without = _recall(model, tokenizer, questions)
    return AblationRecord(
        masked=choice,
        loss=[one.loss for one in whole],
        loss_without=[one.loss for one in without],
        p_without=[one.p for one in without],
        top_without=[one.top for one in without],
        recall=recall,
        recall_without=recall_without,
    )


def _recall(model: Transformer, tokenizer: TextCodec, questions: Sequence[RecallItem]) -> float | None:
    if not questions:
        return None
    scores = score_items(model, tokenizer, questions, device=model.embedding.weight.device)
    return sum(score.exact for score in scores) / len(scores)
