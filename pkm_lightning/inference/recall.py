"""How many facts a model knows: exact match of its answers, choice among four, and bits stored.

Letters: B sequences, T tokens, M answer tokens of the batch.
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

from pkm_lightning.data.base import NO_TARGET, RecallItem, TextCodec
from pkm_lightning.inference.generation import greedy
from pkm_lightning.model.loss import token_nll

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """One question and what the model made of it."""

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
    """Lower case, without punctuation and English articles, single spaces: the rule of open question answering."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_items(
    model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem], *, device: torch.device
) -> list[ItemScore]:
    """Scores every item; `model` is in evaluation mode."""
    answers = greedy(model, tokenizer, [item.prompt for item in items], device=device)
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


@torch.no_grad()
def _answer_nats(
    model: Transformer,
    tokenizer: TextCodec,
    pairs: Sequence[tuple[str, str]],
    *,
    device: torch.device,
    batch_size: int = 1024,
) -> list[float]:
    """-ln p(answer, end of text | prompt) of each (prompt, answer)."""
    rows = []
    for prompt, answer in pairs:
        prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        answer_ids = [*tokenizer.encode(" " + answer), tokenizer.eos_id]
        rows.append((prompt_ids + answer_ids, len(prompt_ids)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    nats = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids_BT, labels_BT = _padded([rows[i] for i in chosen], tokenizer.eos_id, device)
        nll_M = token_nll(model, model(ids_BT).hidden_BTD, labels_BT)
        row_M = torch.nonzero(labels_BT != NO_TARGET)[:, 0]
        sums_B = torch.zeros(len(chosen), device=device).index_add_(0, row_M, nll_M)
        for i, value in zip(chosen, sums_B.tolist(), strict=True):
            nats[i] = value
    return nats


def _padded(rows: Sequence[tuple[list[int], int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and shifted labels; what follows the end of a row is behind it, so causal attention never sees it."""
    width = max(len(ids) for ids, _ in rows) - 1
    ids_BT = torch.full((len(rows), width), filler)
    labels_BT = torch.full((len(rows), width), NO_TARGET)
    for b, (ids, prompt_length) in enumerate(rows):
        ids_BT[b, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BT[b, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return ids_BT.to(device), labels_BT.to(device)


def summarise(scores: Iterable[ItemScore]) -> dict[str, Any]:
    """Means by form: `recall`, `choice`, `bits` (prior less model bits, per fact), also by relation and decile.

    `bits` is the plain mean, which over-confident errors make negative; `bits_clipped` takes each fact at 0 or more.
    """
    scores = list(scores)
    by_form = _grouped(scores, lambda s: s.form)
    return {
        form: {
            **_means(of_form),
            "by_relation": {key: _means(of) for key, of in _grouped(of_form, lambda s: s.relation).items()},
            "by_decile": {str(key): _means(of) for key, of in _grouped(of_form, lambda s: s.decile).items()},
        }
        for form, of_form in by_form.items()
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
    gained = [s.prior_bits - s.bits for s in scores if not math.isnan(s.prior_bits)]
    if gained:
        means["bits"] = _mean(gained)
        means["bits_clipped"] = _mean([max(0.0, bits) for bits in gained])
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
