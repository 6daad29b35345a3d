"""Counts of reads and revival of dead slots in a training loop of your own, for any module that has memory layers.

In the package's own training the callbacks `slot_usage` and `slot_revival` do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.usage.counters import UsageCounters
from pkm_lightning.usage.figures import report
from pkm_lightning.usage.layer_reads import LayerReads
from pkm_lightning.usage.query_recorder import QueryRecorder
from pkm_lightning.usage.revival import Revival, addressing_by_reader, check_revivable, check_settings
from pkm_lightning.usage.revival_history import RevivalHistory
from pkm_lightning.usage.slot_readers import find_tables


class LoopRevival:
    """Slot usage and slot revival of a model in a loop of your own; forward hooks on its memory layers see the reads.

    Forwards in training mode are counted. What changes in a revival is that of the callback `SlotRevival`. Layers are
    numbered in the order of `model.modules()`; make it when the model is on its device. With several ranks, call `step`
    and `report` on all of them.

    Args:
        model: a module with memory layers anywhere in it.
        optimizers: those that step it; they forget their state of what is revived.
        every_n_steps: optimizer steps between revivals, 1 or more.
        dead_after: steps without a read after which a slot is dead, 1 or more.
        max_share: largest share of a table's rows (and of a half's sub-keys) that changes at a time, 0 to 1.
        source: `busy` (dead rows become copies of busy ones) or `queries` (dead sub-keys move to badly served queries).
        noise: standard deviation of the noise, over the RMS of the row or sub-key.
        window: steps of the sliding window of the counts, 2 or more.
        seed: of the noise.

    Attributes:
        revived: numbers of rows and sub-keys revived so far, by name.

    Raises:
        ConfigError: a value out of range, or a model without layers that could be revived.

    Example:
        >>> import torch
        >>> from pkm_lightning import LoopRevival, MemoryPlus
        >>> model = torch.nn.ModuleList([MemoryPlus(dim=8, n_keys=16, heads=1, knn=2)])
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> revival = LoopRevival(model, optimizer, every_n_steps=4, dead_after=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model[0](torch.randn(4, 8)).y_BTD.square().mean().backward()
        ...     optimizer.step()
        ...     revival.step()
        >>> revival.report()["layers"]["layer0.slot"]["reads"], revival.revived["table0"]
        (32, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        every_n_steps: int = 500,
        dead_after: int = 1000,
        max_share: float = 0.01,
        source: Literal["busy", "queries"] = "busy",
        noise: float = 0.1,
        window: int = 1000,
        seed: int = 0,
    ) -> None:
        self._limits: dict[str, Any] = {"dead_after": dead_after, "max_share": max_share, "noise": noise}
        check_settings("", every_n_steps=every_n_steps, source=source, **self._limits)
        check_integer("window", window, low=2)
        self._every, self._seed, self._step = every_n_steps, seed, 0
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._layers = layers = LayerReads(model, self._count, observes=lambda layer: layer.training)
        device = next((p.device for layer in layers for p in layer.parameters()), torch.device("cpu"))
        per_head: Literal["halves"] | None = "halves" if source == "queries" else None
        self._counters = UsageCounters(layers, window=window, per_head=per_head, device=device, step=0)
        if not self._counters.readers:
            layers.close()
            raise ConfigError(
                f"{type(model).__name__} has no memory layer whose slots could be revived: none of its modules has "
                "slots(), as pkm, memory, memory_plus and peer have."
            )
        self._recorder = QueryRecorder({})
        if source == "queries":
            self._recorder = QueryRecorder(addressing_by_reader("", self._counters.readers))
        else:
            check_revivable("source=busy", find_tables(self._counters.readers).values())
        self._recorder.begin(lambda: (self._step + 1) % self._every == 0)
        self._history = RevivalHistory()

    @property
    def revived(self) -> dict[str, int]:
        """Numbers of rows (`table0`) and sub-keys (`layer0.slot`) revived so far, by name."""
        return self._history.counts

    def _count(self, number: int, trace: dict[str, Tensor], batch: dict[str, Tensor], _: int) -> None:
        self._counters.add_layer(number, trace, batch)

    def step(self, *, revive: bool = True) -> None:
        """Ends a step: call it after `optimizer.step()`, once. Every `every_n_steps` steps it revives dead slots.

        Args:
            revive: False only counts, as it should near the end of training, where what was revived has no time left
                to learn.
        """
        self._counters.end_step()
        self._step += 1
        if revive and self._step % self._every == 0:
            states = [optimizer.state for optimizer in self._optimizers]
            revival = Revival(self._counters, self._history, states, seed=self._seed, step=self._step, **self._limits)
            revival.revive(self._recorder)
        self._recorder.queries.clear()

    def report(self) -> dict[str, Any]:
        """Returns what was read, since the start and in the window; see `pkm_lightning.usage.figures.report`."""
        return report(self._counters, self._step, self._limits["dead_after"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and the history of revivals, for `torch.save`."""
        state = {"counters": self._counters.state_dict(), "history": self._history.state_dict()}
        return {**state, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores counts and history, of a model with the same layers.

        Raises:
            CheckpointError: the state counts other slots than this model has.
        """
        self._counters.load_state_dict(state["counters"])
        self._history.load_state_dict(state["history"])
        self._step = state["step"]

    def close(self) -> None:
        """Removes the hooks: reads are no longer counted."""
        self._recorder.end()
        self._layers.close()
