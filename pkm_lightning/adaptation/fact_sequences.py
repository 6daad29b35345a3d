"""Facts as token sequences: what is learned, and whether a model continues each prompt with its answer.

Letters: B sequences, T positions, M positions with a target, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.data.base import NO_TARGET, Batch, TextCodec, answer_ids, prompt_ids
from pkm_lightning.memory.precision import score_dtype

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk


class FactSequence(NamedTuple):
    """The tokens of one prompt with its answer.

    Attributes:
        fact: number of the fact.
        ids: of a text in front (mostly none), the prompt, the answer and, where answers end, the end token.
        n_given: tokens in front of the answer.
    """

    fact: int
    ids: tuple[int, ...]
    n_given: int

    def behind(self, text: Sequence[int]) -> FactSequence:
        """Returns the sequence behind the tokens of another text."""
        return FactSequence(self.fact, (*text, *self.ids), self.n_given + len(text))


def fact_sequences(
    facts: Sequence[Fact], tokenizer: TextCodec, prompts: Callable[[Fact], Sequence[str]], *, ends: bool
) -> list[FactSequence]:
    """Returns a sequence per prompt, fact by fact.

    Args:
        facts: in their order.
        tokenizer: of the model.
        prompts: returns the prompts of a fact, such as those that are learned.
        ends: whether the end token follows an answer.
    """
    sequences = []
    for number, fact in enumerate(facts):
        answer = [*answer_ids(tokenizer, fact.answer), *([tokenizer.eos_id] if ends else [])]
        for prompt in prompts(fact):
            given = prompt_ids(tokenizer, prompt)
            sequences.append(FactSequence(number, (*given, *answer), len(given)))
    return sequences


def padded(sequences: Sequence[FactSequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, (B, T) each, padded on the right, where causal attention needs no mask."""
    width = max(len(sequence.ids) for sequence in sequences) - 1
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.int64)
    labels_BT = torch.full((len(sequences), width), NO_TARGET)
    for row, (_, ids, n_given) in enumerate(sequences):
        ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BT[row, n_given - 1 : len(ids) - 1] = torch.tensor(ids[n_given:])
    return ids_BT.to(device), labels_BT.to(device)


def padded_batches(sequences: Sequence[FactSequence], most_tokens: int) -> list[Batch]:
    """Returns batches of sequences of similar lengths, of at most `most_tokens` tokens where one sequence has fewer."""
    if not sequences:
        return []
    size = max(1, most_tokens // max(len(sequence.ids) for sequence in sequences))
    cpu = torch.device("cpu")
    made = (padded([sequences[number] for number in numbers], cpu) for numbers in batches(sequences, size))
    return [{"input_ids": ids_BT, "labels": labels_BT} for ids_BT, labels_BT in made]


def batches(sequences: Sequence[FactSequence], size: int) -> Iterator[list[int]]:
    """Yields the numbers of the sequences in batches of similar lengths."""
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def answer_nll(model: Trunk, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Returns the negative log-likelihood per answer token, in nats, (M,)."""
    logits_MW = _logits(model, ids_BT, labels_BT)
    return functional.cross_entropy(logits_MW, labels_BT[labels_BT != NO_TARGET], reduction="none")


@torch.no_grad()
def margins(model: Trunk, sequences: Sequence[FactSequence], *, device: torch.device, batch_size: int = 64) -> Tensor:
    """Returns per sequence by how much its answer leads, in logits, (len(sequences),).

    The margin of a token is its logit minus the highest other one, that of an answer its smallest: where it is above 0,
    the greedy continuation of the prompt is the answer.
    """
    least = torch.empty(len(sequences))
    for numbers in batches(sequences, batch_size):
        ids_BT, labels_BT = padded([sequences[number] for number in numbers], device)
        logits_MW = _logits(model, ids_BT, labels_BT)
        is_target_BT = labels_BT != NO_TARGET
        targets_M1 = labels_BT[is_target_BT].unsqueeze(1)
        target_M = logits_MW.gather(1, targets_M1).squeeze(1)
        margin_M = target_M - logits_MW.scatter(1, targets_M1, -torch.inf).amax(1)
        row_M = is_target_BT.nonzero()[:, 0]
        least_B = margin_M.new_full((len(numbers),), torch.inf).scatter_reduce_(0, row_M, margin_M, "amin")
        least[numbers] = least_B.float().cpu()
    return least


def _logits(model: Trunk, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    logits_MW = model.unembed(model(ids_BT).hidden_BTD[labels_BT != NO_TARGET])  # type: ignore[operator]
    return logits_MW.to(score_dtype(logits_MW))
