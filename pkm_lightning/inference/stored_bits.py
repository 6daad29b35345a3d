"""Bits that a model stores about names and values of known entropy (Allen-Zhu and Li, arXiv 2404.05405, section 2).

With p1 the loss of a name and p2 that of all values of a person, in nats, each summed over tokens and averaged over
people, a model stores N log2(N0 / e**p1) + N log2(S0 / e**p2) bits of the N log2(N0 / N) + N log2(S0) that there are.

| paper | here |
|---|---|
| N, N0, S0 | `FactSpace.people`, `.names`, `.values ** .attributes` |
| R(F), R_max(F) | `stored_bits` and `FactSpace.bits`, each over the parameters |

Letters: B sequences, T positions, M positions with a target, F facts (names and values).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.data.base import NO_TARGET, FactSpace


def fact_nats(nll_M: Tensor, labels_BT: Tensor, doc_ids_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums the losses of each fact.

    Args:
        nll_M: losses of the targets in row-major order.
        labels_BT: targets on facts alone, see `FactSpace`; a run of them is a fact, the first of a document its name.
        doc_ids_BT: number of each position's document; None where a sequence is one document.

    Returns:
        (F,) the sums in float64, and (F,) whether each is that of a name.
    """
    width = labels_BT.shape[1]
    docs_BT = torch.zeros_like(labels_BT) if doc_ids_BT is None else doc_ids_BT.to(labels_BT.dtype)
    # One number per document of the batch; -1 is padding.
    docs_BT = docs_BT + torch.arange(len(labels_BT), device=labels_BT.device)[:, None] * (width + 1)
    is_target_BT = labels_BT != NO_TARGET
    follows_BT = torch.zeros_like(is_target_BT)
    follows_BT[:, 1:] = is_target_BT[:, :-1] & (docs_BT[:, 1:] == docs_BT[:, :-1])
    starts_M = ~follows_BT[is_target_BT]
    fact_M = starts_M.cumsum(0) - 1
    doc_F = docs_BT[is_target_BT][starts_M]
    is_name_F = torch.ones_like(doc_F, dtype=torch.bool)
    is_name_F[1:] = doc_F[1:] != doc_F[:-1]
    sums_F = torch.zeros(len(doc_F), dtype=torch.float64, device=nll_M.device)
    return sums_F.index_add_(0, fact_M, nll_M.double()), is_name_F


@dataclass
class FactLosses:
    """Sums over people, in bits: those of names and values, and what is stored of them with no fact below zero.

    Args:
        space: what the facts were drawn from.
        sums: (5,) float64: names, their bits, those stored of them at least 0 each; bits of values, stored likewise.
    """

    space: FactSpace
    sums: Tensor

    @classmethod
    def none(cls, space: FactSpace, device: torch.device) -> FactLosses:
        """Returns the sums over no people."""
        return cls(space, torch.zeros(5, dtype=torch.float64, device=device))

    def add(self, nats_F: Tensor, is_name_F: Tensor) -> None:
        """Adds what `fact_nats` returns."""
        bits_F = nats_F / math.log(2)
        names, values = bits_F[is_name_F], bits_F[~is_name_F]
        parts = [is_name_F.sum().double(), names.sum(), (self.space.name_bits - names).clamp(min=0).sum()]
        self.sums += torch.stack([*parts, values.sum(), (self.space.value_bits - values).clamp(min=0).sum()])

    def figures(self) -> dict[str, float]:
        """Returns bits stored per name, per value, per person and in all; `clipped` ones count no fact below zero.

        All are nan before anything was added.
        """
        space, per_person = self.space, (self.sums / self.sums[0]).tolist()
        of_names, of_values = space.name_bits - per_person[1], space.attributes * space.value_bits - per_person[3]
        person, clipped = of_names + of_values, per_person[2] + per_person[4]
        return {
            "bits_name": of_names,
            "bits_value": of_values / space.attributes,
            "bits_person": person,
            "bits_person_clipped": clipped,
            "stored_bits": space.people * person,
            "stored_bits_clipped": space.people * clipped,
            "stored_share": space.people * person / space.bits,
        }
