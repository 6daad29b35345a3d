"""How much deltas of lines change what a model predicts on other text, over all of that text at once.

A read returns d_x = sum_k w_xk D[line_xk] more than before. To second order the predictions then diverge by

    KL per target  =  1/(2 n) sum_x d_x' F_x d_x,        F_x = E[g_x g_x'],

where n targets were read and g_x is the gradient of ln p(y) with respect to what read x returned, for y drawn from the
model itself (the Fisher information); terms between two reads are left out. A matrix F_x per read cannot be estimated
from a draw or two. All reads that matter, those with g_x != 0, share one instead, the mean of |g_x|^2 in all V
directions alike. With the matrix A of the weights of these reads (reads x lines)

    drift(D)  =  tr(D' G D),        G = mean |g|^2 / (2 n V) (A'A + 2 u I),

so that the drift costs one product with G per step, and no forward. u stands for what further text reads and this one
does not: without it, lines that the text never reads would move for nothing, and the divergence on further text would
rise with every step. It is the deleted estimate of Jelinek and Mercer (1985): the mean squared weight with which one
half of the text reads those lines with a delta that the other half never reads. Weights |g_x|^2 per read did
no better in the runs that tried them (scripts/results/2026-11-30-editing).

Letters: N lines of a table, U lines with a delta, V values per line, X reads, K lines per read, M targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.delta_reads import deltas_added
from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.memory.read_recorder import ReadRecorder, ReadUnits

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk

#: Reads whose pairs of lines are added at once.
_AT_ONCE = 8192
#: Lines whose matrix G is held, of 4 bytes per pair; of more lines only its diagonal is.
_MOST_LINES = 8192


class TableDrift:
    """The reads of one table in other text, and what deltas of its lines change there.

    Args:
        table: which is read.
    """

    def __init__(self, table: ValueTable) -> None:
        self._n_lines, self._width = table.n_lines, table.weight.shape[1]
        # Neighbouring batches are of one kind of text: each half has every second one.
        self._halves: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
        self._n_targets, self._n_units, self._strength = 0, 0, 0.0

    def add(self, units: Sequence[ReadUnits], n_targets: int) -> None:
        """Counts the reads of a batch with `n_targets` targets."""
        self._n_targets += n_targets
        self._halves = self._halves[::-1]
        for ids_XK, weights_XK, gradients_XV in units:
            self._strength += float(gradients_XV.double().square().sum())
            self._n_units += len(ids_XK)
            self._halves[0].append((ids_XK, weights_XK))

    @property
    def _scale(self) -> float:
        return self._strength / max(1, self._n_units) / (2 * max(1, self._n_targets) * self._width)

    def _use(self, lines_U: Tensor) -> tuple[Tensor, float]:
        """Returns the sum of the squared weights with which the text reads each line, (U,) float64, and 2 u."""
        halves = []
        for reads in self._halves:
            use_N = torch.zeros(self._n_lines, dtype=torch.float64)
            for ids_XK, weights_XK in reads:
                use_N.index_add_(0, ids_XK.flatten(), weights_XK.double().square().flatten())
            halves.append(use_N[lines_U])
        first_U, second_U = halves
        unread = torch.cat([second_U[first_U == 0], first_U[second_U == 0]])
        return first_U + second_U, 2 * float(unread.mean()) if len(unread) else 0.0

    def diagonal(self, lines_U: Tensor) -> Tensor:
        """Returns the diagonal of G, the drift of a unit delta of each line alone, (U,) float32."""
        use_U, unseen = self._use(lines_U)
        return ((use_U + unseen) * self._scale).float()

    def gram(self, lines_U: Tensor) -> Tensor:
        """Returns G of some lines, (U, U) float32, or its diagonal, (U,), of more than 8,192.

        Args:
            lines_U: in ascending order.
        """
        U = len(lines_U)
        if U > _MOST_LINES:
            return self.diagonal(lines_U)
        place_N = torch.full((self._n_lines,), U)
        place_N[lines_U] = torch.arange(U)
        # Lines without a delta share one row and one column behind the others.
        gram = torch.zeros((U + 1) * (U + 1))
        for ids_XK, weights_XK in chain(*self._halves):
            for ids, weights in zip(ids_XK.split(_AT_ONCE), weights_XK.split(_AT_ONCE), strict=True):
                places_XK = place_N[ids]
                pairs_XKK = places_XK.unsqueeze(2) * (U + 1) + places_XK.unsqueeze(1)
                products_XKK = weights.unsqueeze(2) * weights.unsqueeze(1)
                gram.index_add_(0, pairs_XKK.flatten(), products_XKK.flatten())
        gram = gram.view(U + 1, U + 1)[:U, :U]
        gram.diagonal().add_(self._use(lines_U)[1])
        return gram * self._scale


class Penalty:
    """The drift of the deltas of one table, as a function that is learned with.

    Args:
        drift: of the table.
        lines_U: its lines with a delta, ascending.
        device: of the deltas.

    Attributes:
        steps_U1: by how much each line moves per step, sqrt(m / (G_ii + m)) with the mean m of the diagonal: lines
            that other text reads often move little.
    """

    def __init__(self, drift: TableDrift, lines_U: Tensor, *, device: torch.device) -> None:
        lines_U = lines_U.cpu()
        diagonal_U = drift.diagonal(lines_U)
        mean = diagonal_U.mean().clamp(min=torch.finfo(torch.float32).tiny)
        self.steps_U1 = (mean / (diagonal_U + mean)).sqrt().unsqueeze(1).to(device)
        self._gram = drift.gram(lines_U).to(device)

    def gradient(self, values_UV: Tensor) -> Tensor:
        """Returns 2 G D, the gradient of tr(D' G D), (U, V)."""
        if self._gram.ndim == 1:
            return 2 * self._gram.unsqueeze(1) * values_UV
        return 2 * self._gram @ values_UV


def measure_drift(
    model: Trunk, tables: Iterable[ValueTable], batches: Sequence[Batch], *, device: torch.device
) -> dict[ValueTable, TableDrift]:
    """Returns by table its reads in other text, from one forward and backward of it.

    Args:
        model: in evaluation mode, none of whose parameters requires a gradient.
        tables: all tables of the model that are read.
        batches: of other text.
        device: of the model.
    """
    drifts = {table: TableDrift(table) for table in tables}
    recorders = {table: ReadRecorder() for table in drifts}
    with deltas_added(recorders):
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            output = model(batch["input_ids"], doc_ids_BT=batch.get("doc_ids"))  # type: ignore[operator]
            logits_MW = model.unembed(output.hidden_BTD[batch["labels"] != NO_TARGET])
            log_p_MW = logits_MW.to(score_dtype(logits_MW)).log_softmax(1)
            drawn_M1 = torch.multinomial(log_p_MW.detach().exp(), 1)
            if log_p_MW.requires_grad:
                log_p_MW.gather(1, drawn_M1).sum().backward()
            for table, recorder in recorders.items():
                drifts[table].add(recorder.take(), len(drawn_M1))
    return drifts
