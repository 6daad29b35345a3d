"""Likelihoods of continuations in batches, against one full forward per continuation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from toys import VOCAB, dense, transformer

from pkm_lightning.inference import likelihood
from pkm_lightning.inference.likelihood import Continuation, Likelihood, score
from pkm_lightning.model import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return transformer([dense(2), dense(2)]).eval()


def continuations() -> list[Continuation]:
    """Returns continuations of many lengths; some differ in their last token, some in what is scored of one text."""
    dice = torch.Generator().manual_seed(3)
    made = []
    for length in (2, 3, 9, 9, 14, 30):
        ids = tuple(torch.randint(VOCAB, (length,), generator=dice).tolist())
        made += [Continuation((*ids[:-1], token), n) for token in (4, 7) for n in (1, length - 1)]
    return made


def naive(model: Transformer, ids: tuple[int, ...], length: int) -> Likelihood:
    with torch.no_grad():
        logits_TW = model.unembed(model(torch.tensor([ids[:-1]])).hidden_BTD)[0]
    scored = range(len(ids) - length, len(ids))
    nats = sum(float(logits_TW[t - 1].double().log_softmax(-1)[ids[t]]) for t in scored)
    return Likelihood(nats, all(int(logits_TW[t - 1].argmax()) == ids[t] for t in scored))


@pytest.mark.parametrize(("batch_size", "positions"), [(1, 2048), (3, 2048), (64, 2048), (64, 20)])
def test_batches_of_any_size_give_the_likelihood_of_each_alone(
    model: Transformer, batch_size: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_POSITIONS", positions)
    asked, counted = continuations(), []
    scores = score(model, asked, device=CPU, batch_size=batch_size, done=counted.append)
    expected = [naive(model, *continuation) for continuation in asked]
    assert [nats for nats, _ in scores] == pytest.approx([nats for nats, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert sum(counted) == len(asked)


def test_the_greedy_continuation_is_recognised(model: Transformer) -> None:
    ids = [5, 6]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model.unembed(model(torch.tensor([ids])).hidden_BTD)[0, -1].argmax()))
    other = (*ids[:-1], (ids[-1] + 1) % VOCAB)
    scores = score(model, [Continuation(tuple(ids), 4), Continuation(other, 4)], device=CPU, batch_size=8)
    assert [likelihood.is_greedy for likelihood in scores] == [True, False]


class Counting:
    """A model that keeps the shapes of what it reads and of what it unembeds."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids_BT: torch.Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(ids_BT.shape))
        return SimpleNamespace(hidden_BTD=torch.zeros(*ids_BT.shape, 3))

    def unembed(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(hidden_MD.shape))
        return torch.zeros(len(hidden_MD), VOCAB)


def test_continuations_of_one_input_share_a_forward_and_only_scored_positions_are_unembedded() -> None:
    model = Counting()
    letters = [Continuation((1, 2, 3, token), 1) for token in range(4)]
    score(model, [*letters, Continuation((9, 9), 1)], device=CPU, batch_size=8)  # type: ignore[arg-type]
    assert model.shapes == [(2, 3), (5, 3)]


def test_a_forward_scores_a_bounded_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_POSITIONS", 5)
    model = Counting()
    asked = [Continuation(tuple(range(start, start + 5)), 2) for start in range(4)]
    score(model, [*asked, Continuation(tuple(range(9)), 8)], device=CPU, batch_size=8)  # type: ignore[arg-type]
    assert model.shapes[1::2] == [(8, 3), (4, 3), (4, 3)]


def test_nothing_is_scored_of_nothing(model: Transformer) -> None:
    assert score(model, [], device=CPU, batch_size=8) == []
