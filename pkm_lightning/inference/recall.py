"""Factual recall of a model: exact match of its answers, choice among four options, and bits stored."""

from __future__ import annotations

import math
import operator
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from pkm_lightning.data.base import RecallItem, TextCodec, answer_ids, prompt_ids
from pkm_lightning.inference.answer_nats import nats_behind, nats_of_whole
from pkm_lightning.inference.generation import Answer, greedy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pkm_lightning.model import Transformer
    from pkm_lightning.model.cache import DecodingCache


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
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", _spaced(text)).split())


def _spaced(text: str) -> str:
    return "".join(" " if c in string.punctuation else c for c in text.lower())


def can_become(text: str, truth: str) -> bool:
    """Returns whether a text that begins with `text` can equal `truth` once both are normalised."""
    spaced = _spaced(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # which stands for the half of a character
    # What stands at the end may be the beginning of an article, and then it does not count.
    certain = re.sub(r"\b(a|an|the)\b(?!\Z)", " ", spaced)
    beginnings = certain, re.sub(r"\b(a|an|t|th|the)\Z", "", certain)
    # Without spaces: some tokenizers write " n't" when the apostrophe comes, and " n" before.
    return any(_squeezed(normalise(truth)).startswith(_squeezed(beginning)) for beginning in beginnings)


def _squeezed(text: str) -> str:
    # The lower case of a Greek sigma depends on what follows it.
    sigmas = "\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER SIGMA}"
    return "".join(text.split()).replace(*sigmas)


def score_items(
    model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem], *, device: torch.device
) -> list[ItemScore]:
    """Scores every item by greedy decoding and by the likelihood of its options; `model` is in evaluation mode.

    An answer that is as long as any of its relation, and cannot become the truth, is cut: a model that has not learned
    to end its answers would fill 32 tokens with each.
    """
    scoring = _Scoring(model, tokenizer, items)
    answers = greedy(
        model,
        tokenizer,
        [item.prompt for item in items],
        device=device,
        hopeless=scoring.is_hopeless,
        prompts_read=scoring.score_options if scoring.shares_prompts else None,
    )
    scores = []
    for item, answer, nats in zip(items, answers, scoring.nats(device), strict=True):
        by_option = dict(zip(_candidates(item), nats, strict=True))
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


class _Scoring:
    """What `score_items` computes of its items while their answers are generated."""

    def __init__(self, model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem]) -> None:
        self._model, self._tokenizer, self._items = model, tokenizer, items
        encode, ends = cache(partial(answer_ids, tokenizer)), [tokenizer.eos_id]
        # The end token counts: a model that would continue the answer does not know it.
        self._options = [[[*encode(option), *ends] for option in _candidates(item)] for item in items]
        self._prompts = [tokenizer.encode(item.prompt) or ends for item in items]
        self._nats: dict[int, list[float]] = {}
        self._longest: dict[str, int] = {}
        for item in items:
            self._longest[item.relation] = max(self._longest.get(item.relation, 1), len(encode(item.answer)))

    @property
    def shares_prompts(self) -> bool:
        """Whether answers are scored behind the ids that they are generated from, so that one read serves both."""
        generated = (prompt_ids(self._tokenizer, item.prompt) for item in self._items)
        return self._model.is_cacheable and all(map(operator.eq, self._prompts, generated))

    def is_hopeless(self, answer: Answer) -> bool:
        item = self._items[answer.prompt]
        is_long = len(answer.ids) >= self._longest[item.relation]
        return is_long and not can_become(self._tokenizer.decode(answer.ids), item.answer)

    def score_options(self, answers: Sequence[Answer], logits_BW: Tensor, read: DecodingCache | None) -> None:
        """Scores the options behind the prompts that the cache `read` holds."""
        assert read is not None
        numbers = [answer.prompt for answer in answers]
        nats = nats_behind(self._model, read, logits_BW, [self._options[number] for number in numbers])
        self._nats.update(zip(numbers, nats, strict=True))

    def nats(self, device: torch.device) -> list[list[float]]:
        """Returns -ln p(option, end of text | prompt) of the options of all items."""
        if not self._nats:
            return nats_of_whole(self._model, self._prompts, self._options, device=device)
        return [self._nats[number] for number in range(len(self._items))]


def _candidates(item: RecallItem) -> tuple[str, ...]:
    return item.options or (item.answer,)


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
