"""Greedy decoding with a cache, step by step, against one forward of all that was written.

If each token is the most likely one after a full forward of those before it, decoding without a cache writes the same.
Letters: W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tolerances import BF16_DECODING, assert_close
from torch import Tensor

from pkm_lightning.model import Transformer


@torch.no_grad()
def write(model: Transformer, prompts: Sequence[Sequence[int]], steps: int) -> tuple[list[list[int]], Tensor]:
    """Returns the tokens of each answer, and the logits that chose them, (B, steps, W)."""
    width = max(map(len, prompts))
    padded_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
    valid_BT = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    cache = model.new_cache(len(prompts), width + steps - 1)
    inputs_BT, chosen, logits = padded_BT, [], []
    for step in range(steps):
        hidden_BTD = model(inputs_BT, valid_BT=valid_BT if step == 0 else None, cache=cache).hidden_BTD
        logits.append(model.unembed(hidden_BTD[:, -1]))
        chosen.append(logits[-1].argmax(-1))
        inputs_BT = chosen[-1].unsqueeze(1)
    return torch.stack(chosen, 1).tolist(), torch.stack(logits, 1)


@torch.no_grad()
def check_cached_decoding(model: Transformer, steps: int) -> None:
    """Compares logits and greedy tokens of a ragged batch, and of a prompt alone, with full forwards."""
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(50, (length,), generator=draw).tolist() for length in (4, 1, 7)]
    answers, logits_BTW = write(model, prompts, steps)
    (alone,), alone_BTW = write(model, prompts[:1], min(steps, 20))
    other_tokens = []
    for prompt, answer, logits_TW in [
        *zip(prompts, answers, logits_BTW, strict=True),
        (prompts[0], alone, alone_BTW[0]),
    ]:
        hidden_BTD = model(torch.tensor([prompt + answer[:-1]])).hidden_BTD
        full_TW = model.unembed(hidden_BTD[0, -len(answer) :])
        other_tokens += [a != b for a, b in zip(full_TW.argmax(1).tolist(), answer, strict=True)]
        if full_TW.dtype == torch.float32:
            assert_close(logits_TW, full_TW)
        else:
            assert (logits_TW - full_TW).float().norm() / full_TW.float().norm() < BF16_DECODING["logits"]
    allowed = 0 if logits_BTW.dtype == torch.float32 else BF16_DECODING["tokens"]
    assert sum(other_tokens) <= allowed * len(other_tokens)
    assert len({token for answer in answers for token in answer}) > 3, "the answers must not be one token repeated"
