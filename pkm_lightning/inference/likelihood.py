"""Log-likelihoods of the last tokens of sequences, in batches of sequences of similar lengths.

Letters: B sequences, T positions, M scored positions, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.memory.precision import score_dtype

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer

#: Scored positions per forward, unless one sequence alone has more: their logits are the largest tensor.
_POSITIONS = 2048


class Continuation(NamedTuple):
    """The last `length` tokens of `ids`, which are scored given those before them; `length` < len(ids)."""

    ids: tuple[int, ...]
    length: int


class Likelihood(NamedTuple):
    """The score of a continuation: ln p, and whether every token of it is the most likely one."""

    nats: float
    is_greedy: bool


@dataclass
class _Input:
    """The tokens that a forward reads, and the continuations that are scored with it."""

    ids: tuple[int, ...]
    #: (number of the continuation, its targets): those of one input differ in the last token or in their length.
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return sum(len(targets) for _, targets in self.targets)


# Compiled blocks run uncompiled here: every batch has another length.
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def score(
    model: Transformer,
    continuations: Sequence[Continuation],
    *,
    device: torch.device,
    batch_size: int,
    done: Callable[[int], object] = lambda n: None,
) -> list[Likelihood]:
    """Returns the likelihood of each continuation, in their order.

    Args:
        model: in evaluation mode.
        continuations: what to score. Those that differ in their last token alone, such as the letters of a
            multiple-choice question, share a forward.
        device: the device that the model is on.
        batch_size: largest number of sequences per forward.
        done: called with the number of continuations that a forward has scored.
    """
    inputs: dict[tuple[int, ...], _Input] = {}
    for number, (ids, length) in enumerate(continuations):
        read = inputs.setdefault(ids[:-1], _Input(ids[:-1]))
        read.targets.append((number, ids[-length:]))
    scores: list[Likelihood | None] = [None] * len(continuations)
    for batch in _batches(list(inputs.values()), batch_size):
        targets = [target for read in batch for target in read.targets]
        for (number, _), likelihood in zip(targets, _score_batch(model, batch, device), strict=True):
            scores[number] = likelihood
        done(len(targets))
    return [likelihood for likelihood in scores if likelihood is not None]


def _batches(inputs: list[_Input], batch_size: int) -> Iterator[list[_Input]]:
    """Yields the inputs in batches, the longest first: a batch that exceeds the memory comes at once."""
    batch: list[_Input] = []
    positions = 0
    for read in sorted(inputs, key=lambda read: (-len(read.ids), read.ids)):
        if batch and (len(batch) == batch_size or positions + read.positions > _POSITIONS):
            yield batch
            batch, positions = [], 0
        batch.append(read)
        positions += read.positions
    if batch:
        yield batch


def _score_batch(model: Transformer, batch: list[_Input], device: torch.device) -> list[Likelihood]:
    """Returns the likelihoods of all targets of a batch, input by input."""
    width = len(batch[0].ids)
    # Padded on the right, where no mask is needed: attention is causal, and what follows a position does not change it.
    ids_BT = torch.tensor([[*read.ids, *([0] * (width - len(read.ids)))] for read in batch], device=device)
    rows: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    lengths: list[int] = []
    for row, read in enumerate(batch):
        for _, targets in read.targets:
            rows += [row] * len(targets)
            positions += range(len(read.ids) - len(targets), len(read.ids))
            tokens += targets
            lengths.append(len(targets))
    # Only scored positions are unembedded, and once per forward, as `synchronized_forwards` expects.
    hidden_MD = model(ids_BT).hidden_BTD[torch.tensor(rows, device=device), torch.tensor(positions, device=device)]
    logits_MW = model.unembed(hidden_MD)
    logits_MW = logits_MW.to(score_dtype(logits_MW))
    tokens_M = torch.tensor(tokens, device=device)
    nll_M = functional.cross_entropy(logits_MW, tokens_M, reduction="none")
    return _sums(nll_M.cpu().double(), (logits_MW.argmax(-1) == tokens_M).cpu(), lengths)


def _sums(nll_M: Tensor, is_greedy_M: Tensor, lengths: list[int]) -> list[Likelihood]:
    return [
        Likelihood(-float(nll.sum()), bool(is_greedy.all()))
        for nll, is_greedy in zip(nll_M.split(lengths), is_greedy_M.split(lengths), strict=True)
    ]
