"""What a model expects behind each token of a text.

Letters: M positions, W vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.inspection.windows import Pieces, windows
from pkm_lightning.memory.precision import score_dtype

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer

#: Most likely next tokens that are reported.
TOP = 5
#: Positions whose logits are held at a time.
_POSITIONS = 128


class Expectations:
    """The expectations behind the tokens of one text, in growing lists of T entries.

    Args:
        ids: the tokens of the text.
        scored: the tokens whose probabilities are taken; None: the next token, and behind the last one the most likely
            token.

    Attributes:
        scored: those tokens, as far as the lists go.
        nats: ln p of the scored token.
        top: id, text and probability of the most likely tokens.
    """

    def __init__(self, ids: Sequence[int], scored: Sequence[int] | None = None) -> None:
        self.ids, self._asked = list(ids), scored
        self.scored: list[int] = []
        self.nats: list[float] = []
        self.top: list[list[tuple[int, str, float]]] = []

    @property
    def p(self) -> list[float]:
        """Probabilities of the scored tokens."""
        return [math.exp(nats) for nats in self.nats]

    @property
    def loss(self) -> float | None:
        """Nats per target; None for a text of one token, which has none."""
        return -sum(self.nats[:-1]) / (len(self.ids) - 1) if len(self.ids) > 1 else None

    def add(self, model: Transformer, hidden_TD: Tensor, pieces: Pieces) -> None:
        """Appends the expectations behind the next T tokens, of hidden states after the final norm."""
        for hidden_MD in hidden_TD.split(_POSITIONS):
            logits_MW = model.unembed(hidden_MD)
            nats_MW = logits_MW.to(score_dtype(logits_MW)).log_softmax(-1)
            best = nats_MW.topk(min(TOP, nats_MW.shape[-1]), -1)
            ids_MT, p_MT = best.indices.tolist(), best.values.exp().tolist()
            places = range(len(self.nats), len(self.nats) + len(hidden_MD))
            scored = [self._scored_at(place, ids[0]) for place, ids in zip(places, ids_MT, strict=True)]
            scored_M1 = torch.tensor(scored, device=nats_MW.device).unsqueeze(1)
            self.scored += scored
            self.nats += nats_MW.gather(1, scored_M1).flatten().tolist()
            for place, ids, ps in zip(places, ids_MT, p_MT, strict=True):
                self.top.append([(token, pieces(token, self.ids[place]), p) for token, p in zip(ids, ps, strict=True)])

    def _scored_at(self, place: int, likely: int) -> int:
        if self._asked is not None:
            return self._asked[place]
        return self.ids[place + 1] if place + 1 < len(self.ids) else likely


@torch.no_grad()
def expectations(
    model: Transformer, pieces: Pieces, ids: Sequence[int], scored: Sequence[int] | None = None, *, context: int
) -> Expectations:
    """Returns the expectations behind every token of a text.

    Args:
        model: in evaluation mode.
        pieces: texts of tokens.
        ids, scored: as for `Expectations`.
        context: most tokens per forward.
    """
    made = Expectations(ids, scored)
    with torch.compiler.set_stance("force_eager"):
        for window in windows(len(ids), context):
            ids_BT = torch.tensor([list(ids[window.begin : window.end])], device=model.embedding.weight.device)
            made.add(model, model(ids_BT).hidden_BTD[0, window.first - window.begin :], pieces)
    return made
