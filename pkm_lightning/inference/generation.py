"""Greedy continuation of prompts, in batches of equal length, so that no padding is ever attended to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.model import Transformer


# Compiled blocks run uncompiled here: every token has another length, and compiling takes longer than the answers.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
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
    # An empty prompt still needs a token to continue from.
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    answers = [""] * len(prompts)
    for batch in _equal_lengths(encoded, batch_size):
        ids_BT = torch.tensor([encoded[i] for i in batch], device=device)
        start = ids_BT.shape[1]
        done_B = torch.zeros(len(batch), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            next_B = model.unembed(model(ids_BT).hidden_BTD[:, -1]).argmax(-1)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
            done_B |= next_B == tokenizer.eos_id
            if bool(done_B.all()):
                break
        # Answers that ended early were continued with the others; what follows their end token is dropped.
        for i, ids in zip(batch, ids_BT[:, start:].tolist(), strict=True):
            end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            answers[i] = tokenizer.decode(ids[:end]).strip()
    return answers


def _equal_lengths(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yields indices in batches of prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
