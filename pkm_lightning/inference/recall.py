"""Factual recall of a model: exact match of its answers, choice among four options, and bits stored.

Letters: M answer tokens of a batch.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkm_lightning.data.base import NO_TARGET, RecallItem, TextCodec, answer_ids
from pkm_lightning.inference.generation import greedy
from pkm_lightning.model.loss import token_nll

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """One question with the model's answer and scores."""

    form: str
    relation: str
    decile: int
    prompt: str
    truth: str
    answer: str
    #: The normalised texts are equal.
    exact: bool
    #: The truth has the highest log-likelihood of its options; None where there are no options.
    chosen: bool | None
    #: -log2 p(truth and end of text | prompt).
    bits: float
    #: -log2 of the answer's share in its relation; nan where unknown.
    prior_bits: float


def normalise(text: str) -> str:
    """Returns lower case without punctuation and English articles, single spaces: the rule of SQuAD's metric."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_items(
    model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem], *, device: torch.device
) -> list[ItemScore]:
    """Scores every item by greedy decoding and by the likelihood of its options; `model` is in evaluation mode."""
    answers = greedy(model, tokenizer, [item.prompt for item in items], device=device)
    # The options of all items are scored together, so that batches are full.
    candidates = [(item.prompt, option) for item in items for option in _candidates(item)]
    nats = iter(_answer_nats(model, tokenizer, candidates, device=device))
    scores = []
    for item, answer in zip(items, answers, strict=True):
        options = _candidates(item)
        by_option = dict(zip(options, [next(nats) for _ in options], strict=True))
        best = min(by_option, key=lambda option: by_option[option])
        scores.append(
            ItemScore(
                form=item.form,
                relation=item.relation,
                decile=item.decile,
                prompt=item.prompt,
                truth=item.answer,
                answer=answer,
                exact=normalise(answer) == normalise(item.answer),
                chosen=best == item.answer if item.options else None,
                bits=by_option[item.answer] / math.log(2),
                prior_bits=item.prior_bits,
            )
        )
    return scores


def _candidates(item: RecallItem) -> tuple[str, ...]:
    return item.options or (item.answer,)


# Uncompiled, as in `greedy`: every batch has another length.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def _answer_nats(
    model: Transformer,
    tokenizer: TextCodec,
    pairs: Sequence[tuple[str, str]],
    *,
    device: torch.device,
    batch_size: int = 1024,
) -> list[float]:
    """Returns -ln p(answer, end of text | prompt) of each (prompt, answer)."""
    sequences = []
    for prompt, answer in pairs:
        prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        # The end token counts: a model that would continue the answer does not know it.
        ids = [*answer_ids(tokenizer, answer), tokenizer.eos_id]
        sequences.append((prompt_ids + ids, len(prompt_ids)))
    # Sorted by length, so that a batch has little padding.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]))
    nats = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids_BT, labels_BT = _padded([sequences[i] for i in batch], tokenizer.eos_id, device)
        nll_M = token_nll(model, model(ids_BT).hidden_BTD, labels_BT)
        sequence_M = torch.nonzero(labels_BT != NO_TARGET)[:, 0]
        # In the dtype of the losses: inside a forward context of Lightning torch's default is that of the weights.
        sums_B = nll_M.new_zeros(len(batch)).index_add_(0, sequence_M, nll_M)
        for i, value in zip(batch, sums_B.tolist(), strict=True):
            nats[i] = value
    return nats


def _padded(sequences: Sequence[tuple[list[int], int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns inputs and shifted labels of (ids, length of the prompt), padded on the right with `filler`."""
    width = max(len(ids) for ids, _ in sequences) - 1
    # No mask is needed: attention is causal, and padding follows the last token that has a target.
    ids_BT = torch.full((len(sequences), width), filler)
    labels_BT = torch.full((len(sequences), width), NO_TARGET)
    for b, (ids, prompt_length) in enumerate(sequences):
        ids_BT[b, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BT[b, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return ids_BT.to(device), labels_BT.to(device)


def summarise(scores: Iterable[ItemScore]) -> dict[str, Any]:
    """Returns means by form: `recall`, `choice`, `bits` (prior minus model bits, per fact), by relation and decile too.

    `bits` is the plain mean, which over-confident errors make negative; `bits_clipped` counts a negative fact as 0.
    """
    scores = list(scores)
    by_form = _grouped(scores, lambda s: s.form)
    return {
        form: {
            **_means(group),
            "by_relation": {key: _means(part) for key, part in _grouped(group, lambda s: s.relation).items()},
            # Text, since this goes into JSON.
            "by_decile": {str(key): _means(part) for key, part in _grouped(group, lambda s: s.decile).items()},
        }
        for form, group in by_form.items()
    }


def _grouped(scores: Sequence[ItemScore], key: Callable[[ItemScore], Any]) -> dict[Any, list[ItemScore]]:
    groups: dict[Any, list[ItemScore]] = {}
    for score in scores:
        groups.setdefault(key(score), []).append(score)
    return dict(sorted(groups.items()))


def _means(scores: Sequence[ItemScore]) -> dict[str, float | int]:
    means: dict[str, float | int] = {"n": len(scores), "recall": _mean([s.exact for s in scores])}
    chosen = [s.chosen for s in scores if s.chosen is not None]
    if chosen:
        means["choice"] = _mean(chosen)
    stored_bits = [s.prior_bits - s.bits for s in scores if not math.isnan(s.prior_bits)]
    if stored_bits:
        means["bits"] = _mean(stored_bits)
        means["bits_clipped"] = _mean([max(0.0, bits) for bits in stored_bits])
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
