"""Greedy continuation of prompts, in batches of equal length, so that no padding is ever attended to.

Letters: B prompts of one length, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.model import Transformer


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
    """The most likely continuation of each prompt up to the end-of-text token, as stripped text.

    Args:
        model: in evaluation mode.
        prompts: texts; the answer's leading space is the model's to write.
        device: where the model lies.
        max_new_tokens: tokens after which an answer is cut.
        batch_size: prompts a forward, at most.
    """
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    answers = [""] * len(prompts)
    for chosen in _equal_lengths(encoded, batch_size):
        ids_BT = torch.tensor([encoded[i] for i in chosen], device=device)
        start = ids_BT.shape[1]
        done_B = torch.zeros(len(chosen), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            next_B = model.unembed(model(ids_BT).hidden_BTD[:, -1]).argmax(-1)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
            done_B |= next_B == tokenizer.eos_id
            if bool(done_B.all()):
                break
        for i, ids in zip(chosen, ids_BT[:, start:].tolist(), strict=True):
            end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            answers[i] = tokenizer.decode(ids[:end]).strip()
    return answers


def _equal_lengths(encoded: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(i)
    for same in by_length.values():
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]
