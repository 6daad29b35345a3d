"""The loop that learns the deltas of an edit.

    minimise  -ln p(answer) per answer token  +  c (KL on a batch of other text  +  4 drift(D)  per token)

KL is exact, and sees few tokens per step: alone, it is met on the text that it has seen and not on further text. The
drift (`drift.py`) is an approximation, and sees all of the text in every step. Adam moves each line by a step that is
the smaller the more often other text reads the line.

The weight c of the divergence is a Lagrange multiplier: at each look at the held-out text it is multiplied by a
power of the ratio of the divergence there to its bound, within limits. Of all looks within the bound the one with the
most right answers is taken, and of those the one with the largest mean margin, of which each prompt counts up to the
margin that ends the learning. The last deltas, scaled down to the bound, are taken instead where they answer more.

Letters: U lines with a delta, V values per line.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.adaptation.drift import Penalty, TableDrift
from pkm_lightning.adaptation.fact_sequences import FactSequence, answer_nll, margins, padded
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.delta_reads import deltas_added
from pkm_lightning.memory.row_deltas import RowDeltas

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk

#: Weight of the drift beside the exact divergence.
_DRIFT = 4.0
#: Positions of other text that are compared per step.
_POSITIONS = 512
#: The multiplier at first, over the bound; the least and largest factor per look; its limits.
_FIRST, _DOWN, _UP, _LEAST, _MOST = 1.0, 0.5, 4.0, 1e-3, 1e5
#: Of the ratio of the divergence to its bound, by which the multiplier changes: the divergence follows it slowly, and
#: deltas that are scaled down to the bound in the end answer far less than those that were learned within it.
_POWER = 1.5
#: Looks take at most this share of the time.
_LOOKING = 0.25
#: Steps between looks, at least.
_BETWEEN = 20
#: By what share of their size random rows of the unit change the last hidden states; smaller changes are noise.
_CHANGE, _LEAST_CHANGE = 1.0, 1e-5
#: Halvings of the interval in which a scale is sought.
_HALVINGS = 6


@dataclass(frozen=True)
class Progress:
    """What has been learned at one look.

    Attributes:
        step: optimizer steps so far.
        seconds: since the first.
        right: share of the prompts that are answered right.
        margin: by how many logits the answers lead, the mean over the prompts; more than the setting `margin` counts
            as that.
        divergence: mean KL on the held-out text, in nats per token.
    """

    step: int
    seconds: float
    right: float
    margin: float
    divergence: float

    @property
    def rank(self) -> tuple[float, float]:
        """What decides between two looks within the bound."""
        return self.right, self.margin


@dataclass(frozen=True)
class Learned:
    """The deltas that were learned.

    Attributes:
        values: by table, (U, V) each.
        steps: optimizer steps.
        seconds: of the learning.
        ended: why it ended: `learned`, `steps` or `seconds`; `known` where there was nothing to learn.
    """

    values: dict[ValueTable, Tensor]
    steps: int
    seconds: float
    ended: str


def learn_deltas(
    model: Trunk,
    deltas: dict[ValueTable, RowDeltas],
    tables: Sequence[ValueTable],
    sequences: Sequence[FactSequence],
    *,
    drifts: Mapping[ValueTable, TableDrift],
    penalised: OtherText,
    held_out: OtherText,
    settings: WritingSettings,
    context: int | None,
    device: torch.device,
    watch: Callable[[Progress], None] | None,
) -> Learned:
    """Trains deltas, which change in place, so that the model continues the prompts with their answers.

    Args:
        model: in evaluation mode, none of whose parameters requires a gradient.
        deltas: by table, zero at first.
        tables: all tables of the model.
        sequences: the prompts with their answers.
        drifts: the reads of the tables in the penalised text.
        penalised: text on which the divergence is penalised.
        held_out: text on which it is bounded.
        settings: see there.
        context: most tokens per sequence; None for any number.
        device: of the model.
        watch: called at each look.
    """
    with deltas_added(deltas, tables):
        loop = _Loop(model, deltas, drifts, sequences, penalised, held_out, settings, context, device)
        ended = loop.run(watch)
        values = loop.best()
    return Learned(values, loop.step, loop.seconds, ended)


class _Loop:
    def __init__(
        self,
        model: Trunk,
        deltas: dict[ValueTable, RowDeltas],
        drifts: Mapping[ValueTable, TableDrift],
        sequences: Sequence[FactSequence],
        penalised: OtherText,
        held_out: OtherText,
        settings: WritingSettings,
        context: int | None,
        device: torch.device,
    ) -> None:
        self._model, self._deltas, self._sequences, self._device = model, deltas, sequences, device
        self._penalised, self._held_out, self._settings, self._context = penalised, held_out, settings, context
        self._draw = random.Random(settings.seed)
        self._order: list[int] = []
        self._multiplier, self.step = _FIRST / settings.kl_bound, 0
        self._started = time.perf_counter()
        self._looked, self._look_seconds = 0.0, 0.0
        self._best: tuple[Progress, dict[ValueTable, Tensor]] | None = None
        self._last = Progress(0, 0.0, 0.0, 0.0, 0.0)
        moving = {table: added for table, added in deltas.items() if len(added.lines_U)}
        self._penalties = {
            table: Penalty(drifts[table], added.lines_U, device=added.lines_U.device) for table, added in moving.items()
        }
        #: What Adam moves: the deltas over the step of their line.
        self._scaled = {table: added.values_UV.detach().clone() for table, added in moving.items()}
        groups = [
            {"params": [self._scaled[table]], "lr": settings.lr * self._unit(table, added)}
            for table, added in moving.items()
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]

    @torch.no_grad()
    def _unit(self, table: ValueTable, added: RowDeltas) -> float:
        """Returns the typical size of a value of the rows that may move.

        Rows of a new memory that starts at zero have none, and what size a pretrained model needs differs by orders
        of magnitude: there it is the size at which random rows change the last hidden states by a share.
        """
        rows_UV = table.weight.detach()[added.lines_U].float()
        if rows_UV.any(1).float().mean() >= 0.5:
            return max(float(rows_UV.square().mean().sqrt()), 0.1 * table.std)
        ids_BT, labels_BT = padded(self._sequences[: self._settings.batch_size], self._device)
        zero_MD = self._answer_states(ids_BT, labels_BT)
        added.values_UV.normal_(std=table.std)
        drawn_MD = self._answer_states(ids_BT, labels_BT)
        added.values_UV.zero_()
        change = float((drawn_MD - zero_MD).norm() / zero_MD.norm())
        return table.std * _CHANGE / max(change, _LEAST_CHANGE)

    def _answer_states(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        hidden_MD: Tensor = self._model(ids_BT).hidden_BTD[labels_BT != NO_TARGET]  # type: ignore[operator]
        return hidden_MD.double()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self._started

    def run(self, watch: Callable[[Progress], None] | None) -> str:
        """Runs until everything is right by the margin within the bound, or a limit is reached; returns which."""
        while True:
            self._update()
            ended = ""
            if self.step >= self._settings.max_steps:
                ended = "steps"
            elif self.seconds >= self._settings.max_seconds:
                ended = "seconds"
            if ended or self._is_due():
                if self._look(watch):
                    return "learned"
                if ended:
                    return ended

    def _update(self) -> None:
        sequences = [self._placed(self._sequences[number]) for number in self._next()]
        loss = answer_nll(self._model, *padded(sequences, self._device)).mean()
        if len(self._penalised):
            drift = self._penalised.divergence(self._draw.randrange(len(self._penalised)), _POSITIONS).mean()
            loss = loss + self._multiplier * drift
        loss.backward()
        self._move()
        self.step += 1

    @torch.no_grad()
    def _move(self) -> None:
        """Adds the gradient of the drift, and moves the deltas by one step of Adam."""
        for table, penalty in self._penalties.items():
            values_UV = self._deltas[table].values_UV
            gradient_UV = penalty.gradient(values_UV) * (self._multiplier * _DRIFT)
            if values_UV.grad is not None:
                gradient_UV += values_UV.grad
            self._scaled[table].grad = gradient_UV * penalty.steps_U1
            values_UV.grad = None
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * min(1.0, 2 * (1 - self._progress))
        self._optimizer.step()
        for table, penalty in self._penalties.items():
            self._deltas[table].values_UV.copy_(self._scaled[table] * penalty.steps_U1)

    @property
    def _progress(self) -> float:
        """The share of the steps, or of the time, that has passed."""
        return min(1.0, max(self.step / self._settings.max_steps, self.seconds / self._settings.max_seconds))

    def _next(self) -> list[int]:
        """Returns the numbers of the next prompts: each once before any comes again."""
        size = min(self._settings.batch_size, len(self._sequences))
        while len(self._order) < size:
            self._order += self._draw.sample(range(len(self._sequences)), len(self._sequences))
        chosen, self._order = self._order[:size], self._order[size:]
        return chosen

    def _placed(self, sequence: FactSequence) -> FactSequence:
        """Returns a sequence as it is or, by the share `contexts`, behind a piece of other text."""
        if not len(self._penalised) or self._draw.random() >= self._settings.contexts:
            return sequence
        ids_BT = self._draw.choice(self._penalised.batches)["input_ids"]
        text = ids_BT[self._draw.randrange(len(ids_BT))].tolist()
        room = len(text) if self._context is None else min(len(text), self._context - len(sequence.ids) + 1)
        length = self._draw.randint(0, max(0, room))
        return sequence.behind(text[:length])

    def _is_due(self) -> bool:
        if self.step % _BETWEEN:
            return False
        return self.seconds - self._looked >= self._look_seconds * (1 - _LOOKING) / _LOOKING

    def _look(self, watch: Callable[[Progress], None] | None) -> bool:
        """Measures what has been learned; returns whether that is everything."""
        began = self.seconds
        margins_S = margins(self._model, self._sequences, device=self._device)
        divergence = self._held_out.mean_divergence()
        within = divergence <= self._settings.kl_bound
        self._last = self._progress_at(began, margins_S, divergence)
        if within and (self._best is None or self._last.rank > self._best[0].rank):
            self._best = (self._last, self._values())
        change = min(_UP, max(_DOWN, (divergence / self._settings.kl_bound) ** _POWER))
        self._multiplier = min(_MOST, max(_LEAST, self._multiplier * change))
        if watch is not None:
            watch(self._last)
        self._looked, self._look_seconds = self.seconds, self.seconds - began
        return within and bool((margins_S >= self._settings.margin).all())

    def _progress_at(self, seconds: float, margins_S: Tensor, divergence: float) -> Progress:
        right, margin = (margins_S > 0).float().mean(), margins_S.clamp(max=self._settings.margin).mean()
        return Progress(self.step, seconds, float(right), float(margin), divergence)

    def _values(self, scale: float = 1.0) -> dict[ValueTable, Tensor]:
        return {table: added.values_UV.detach() * scale for table, added in self._deltas.items()}

    @torch.no_grad()
    def best(self) -> dict[ValueTable, Tensor]:
        """Returns the best deltas within the bound."""
        bound, best = self._settings.kl_bound, self._best
        # The search takes as long as some looks: for more right answers, not for a larger margin.
        if best is not None and (self._last.divergence <= bound or self._last.right <= best[0].right):
            return best[1]
        last = self._values()
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            self._put(last, middle)
            low, high = (middle, high) if self._held_out.mean_divergence() <= bound else (low, middle)
        self._put(last, low)
        margins_S = margins(self._model, self._sequences, device=self._device)
        scaled = self._progress_at(self.seconds, margins_S, bound)
        return self._values() if best is None or scaled.rank > best[0].rank else best[1]

    def _put(self, values: dict[ValueTable, Tensor], scale: float) -> None:
        for table, added in self._deltas.items():
            added.values_UV.copy_(values[table] * scale)
