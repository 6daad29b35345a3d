"""Log-likelihoods of several answers to each prompt, behind a cache that holds the prompts or with prompts in front.

Four options share a prompt that is longer than they are: behind a cache they are a third of the tokens.

Letters: Q prompts, A answers of a batch, M answer tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.model.loss import token_nll

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer
    from pkm_lightning.model.cache import DecodingCache

#: Answers per forward.
_BATCH = 1024


# Uncompiled, as in `greedy`: every batch has another length.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def nats_behind(
    model: Transformer, cache: DecodingCache, logits_QW: Tensor, answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Returns -ln p(answer | prompt) of the answers to each prompt.

    Args:
        model: in evaluation mode.
        cache: holds the prompts; it is left as it is.
        logits_QW: of the tokens that follow the prompts.
        answers: ids of at least one token, by prompt.
    """
    flat = [(q, ids) for q, of_prompt in enumerate(answers) for ids in of_prompt]
    logits_QW = logits_QW.to(score_dtype(logits_QW))
    nats: list[float] = []
    for start in range(0, len(flat), _BATCH):
        batch = [ids for _, ids in flat[start : start + _BATCH]]
        rows_A = torch.tensor([q for q, _ in flat[start : start + _BATCH]], device=logits_QW.device)
        first_A = torch.tensor([ids[0] for ids in batch], device=logits_QW.device)
        nats_A = functional.cross_entropy(logits_QW[rows_A], first_A, reduction="none")
        longest = max(map(len, batch))
        if longest > 1:
            inputs_AT, labels_AT = _padded([(ids, 1) for ids in batch], logits_QW.device)
            branch = cache.branch(rows_A, longest - 1)
            hidden_ATD = model(inputs_AT, cache=branch).hidden_BTD
            nats_A = nats_A + _sums(token_nll(model, hidden_ATD, labels_AT), labels_AT)
        nats += nats_A.tolist()
    remaining = iter(nats)
    return [[next(remaining) for _ in of_prompt] for of_prompt in answers]


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def nats_of_whole(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    device: torch.device,
) -> list[list[float]]:
    """Returns the same from each prompt with each answer: for a model that reads tokens in ways that no cache holds.

    Args:
        model: in evaluation mode.
        prompts: ids of at least one token.
        answers: ids of at least one token, by prompt.
        device: the device that the model is on.
    """
    pairs = [([*prompt, *ids], len(prompt)) for prompt, these in zip(prompts, answers, strict=True) for ids in these]
    # Sorted by length, so that a batch has little padding.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    nats = [0.0] * len(pairs)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        inputs_AT, labels_AT = _padded([pairs[i] for i in batch], device)
        sums_A = _sums(token_nll(model, model(inputs_AT).hidden_BTD, labels_AT), labels_AT)
        for i, value in zip(batch, sums_A.tolist(), strict=True):
            nats[i] = value
    remaining = iter(nats)
    return [[next(remaining) for _ in these] for these in answers]


def _sums(nats_M: Tensor, labels_AT: Tensor) -> Tensor:
    """Returns the sums of the answers, (A,)."""
    answer_M = torch.nonzero(labels_AT != NO_TARGET)[:, 0]
    # In the dtype of the losses: inside a forward context of Lightning torch's default is that of the weights.
    return nats_M.new_zeros(len(labels_AT)).index_add_(0, answer_M, nats_M)


def _padded(sequences: Sequence[tuple[Sequence[int], int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns inputs and shifted labels of (ids, number of them without a target), padded on the right with 0."""
    width = max(len(ids) for ids, _ in sequences) - 1
    # No mask is needed: attention is causal, and padding follows the last token that has a target.
    inputs_AT = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels_AT = torch.full((len(sequences), width), NO_TARGET)
    for a, (ids, start) in enumerate(sequences):
        inputs_AT[a, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_AT[a, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return inputs_AT.to(device), labels_AT.to(device)
