"""Continuation of prompts with a cache of keys and values, in batches of prompts of similar lengths.

Letters: B sequences, T positions, P tokens so far (padding, prompt and answer), W vocabulary.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.inference.sampling import Sampling

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.model import Transformer

#: The id that fills the left of shorter prompts. The model sees it as token 0, which nothing attends to.
_PADDING = -1


@dataclass
class Answer:
    """One continuation of a prompt.

    Attributes:
        prompt: number of its prompt.
        sample: number of the answer among those of its prompt.
        ids: tokens written so far, without the token that ended it.
        text: their text, up to the stop text that ended it.
        ended: why it ended: `eos`, `stop` or `length`; empty while it is written.
    """

    prompt: int
    sample: int
    ids: list[int]
    text: str = ""
    ended: str = ""


def greedy(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    *,
    device: torch.device,
    max_new_tokens: int = 32,
    batch_size: int = 512,
) -> list[str]:
    """Returns the most likely continuation of each prompt up to the end-of-text token, as stripped text.

    Args:
        model: in evaluation mode.
        tokenizer: encodes the prompts and decodes the answers.
        prompts: texts without a trailing space: the model writes the space before its answer.
        device: the device that the model is on.
        max_new_tokens: tokens after which an answer is cut.
        batch_size: largest number of prompts per forward.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    answers = generate(model, tokenizer, prompts, sampling, device=device, batch_size=batch_size)
    return [answer.text.strip() for (answer,) in answers]


# Compiled blocks run uncompiled here: every token has another length, and compiling takes longer than the answers.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    device: torch.device,
    batch_size: int = 64,
    watch: Callable[[Answer], None] | None = None,
) -> list[list[Answer]]:
    """Returns `sampling.samples` answers to each prompt, in the order of the prompts.

    Args:
        model: in evaluation mode.
        tokenizer: encodes the prompts and decodes the answers.
        prompts: texts. Most tokenizers put a space before a word, so a prompt should not end with one.
        sampling: how each token is chosen and where an answer ends.
        device: the device that the model is on.
        batch_size: largest number of answers written together.
        watch: called with an answer whenever it has a new token or has ended.
    """
    # An empty prompt still needs a token to continue from.
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    answers = [[Answer(i, sample, []) for sample in range(sampling.samples)] for i in range(len(prompts))]
    # Sorted by length, so that a batch has little padding.
    ordered = sorted(itertools.chain.from_iterable(answers), key=lambda answer: len(encoded[answer.prompt]))
    groups = [ordered]
    if not model.is_position_wise:  # without a cache nothing is padded on the left: a batch has prompts of one length
        groups = [list(same) for _, same in itertools.groupby(ordered, lambda answer: len(encoded[answer.prompt]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            _write(model, tokenizer, [encoded[answer.prompt] for answer in batch], batch, sampling, device, watch)
    return answers


def _write(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: list[list[int]],
    answers: list[Answer],
    sampling: Sampling,
    device: torch.device,
    watch: Callable[[Answer], None] | None,
) -> None:
    """Writes one batch of `answers` in place."""
    seen_BP = _left_padded(prompts, device)
    # The last token of an answer is never read.
    capacity = seen_BP.shape[1] + sampling.max_new_tokens - 1
    cache = model.new_cache(len(answers), capacity) if model.is_position_wise else None
    uniform_BT = _draws(answers, sampling).to(device)
    inputs_BT, valid_BT = seen_BP.clamp_min(0), None
    if len({len(ids) for ids in prompts}) > 1:
        valid_BT = seen_BP != _PADDING
    for step in range(sampling.max_new_tokens):
        hidden_BTD = model(inputs_BT, valid_BT=valid_BT, cache=cache).hidden_BTD
        next_B = sampling.choose(model.unembed(hidden_BTD[:, -1]), seen_BP, uniform_BT[:, step])
        for answer, token in zip(answers, next_B.tolist(), strict=True):
            if not answer.ended:
                _enter(answer, token, tokenizer, sampling, watch)
        rows = [row for row, answer in enumerate(answers) if not answer.ended]
        if not rows:
            return
        seen_BP = torch.cat([seen_BP, next_B.unsqueeze(1)], dim=1)
        inputs_BT, valid_BT = seen_BP if cache is None else next_B.unsqueeze(1), None
        # Answers that have ended are computed with the others until they are half of the batch.
        if len(rows) <= len(answers) // 2:
            rows_B = torch.tensor(rows, device=device)
            if cache is not None:
                cache.select(rows_B)
            answers = [answers[row] for row in rows]
            inputs_BT, seen_BP, uniform_BT = inputs_BT[rows_B], seen_BP[rows_B], uniform_BT[rows_B]


def _enter(
    answer: Answer,
    token: int,
    tokenizer: TextCodec,
    sampling: Sampling,
    watch: Callable[[Answer], None] | None,
) -> None:
    """Adds a token to an answer, or ends it."""
    if token == tokenizer.eos_id:
        answer.ended = "eos"
    else:
        answer.ids.append(token)
        if len(answer.ids) == sampling.max_new_tokens:
            answer.ended = "length"
    # Decoding is slow beside a step of a small model, and needed at the end only unless somebody reads along.
    if watch is not None or sampling.stop or answer.ended:
        answer.text = tokenizer.decode(answer.ids)
    ends = [answer.text.index(stop) for stop in sampling.stop if stop in answer.text]
    if ends:
        answer.text, answer.ended = answer.text[: min(ends)], "stop"
    if watch is not None:
        watch(answer)


def _left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the ids of all sequences, (B, T), filled on the left."""
    width = max(map(len, sequences))
    return torch.tensor([[_PADDING] * (width - len(ids)) + list(ids) for ids in sequences], device=device)


def _draws(answers: Sequence[Answer], sampling: Sampling) -> Tensor:
    """Returns one random number per answer and step, (B, T) float64, by seed, prompt and sample alone."""
    if sampling.greedy:
        return torch.zeros(len(answers), sampling.max_new_tokens, dtype=torch.float64)
    rows = []
    for answer in answers:
        seed = zlib.crc32(f"{sampling.seed}/{answer.prompt}/{answer.sample}".encode())
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=generator))
    return torch.stack(rows)
