"""The read background of `finetune=sparse`: in how many sequences of the training each row of the tables was read.

Counted in a few sequences of every n-th step from the first one on, and of the last 1,000 to 2,000 of them: usage
changes while a model is trained. `fit finetune=sparse init_from=RUN` reads them in the checkpoint of the run;
`pkm_lightning.adaptation.background` describes them. No metric is logged.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.adaptation.background import BackgroundCounter, ReadBackground
from pkm_lightning.adaptation.row_reads import RowReads
from pkm_lightning.errors import check_integer
from pkm_lightning.model import Traces
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.training import LanguageModule

__all__ = ["ReadBackgroundCounter"]

_KEY = "callbacks.read_background"
_log = logging.getLogger(__name__)


class ReadBackgroundCounter(L.Callback):
    """Counter of the rows that sequences read; it never waits for the device. Its state is the counts.

    Args:
        every_n_steps: optimizer steps from one count to the next, 1 or more.
        sequences: of the first micro-batch of such a step that each rank counts, 1 or more.
        window: sequences, over all ranks, after which the older ones are forgotten, 1 or more: the background holds so
            many to twice as many.
        max_slots: tables with more rows are not counted, since the counts take 24 bytes per row; None: all are.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, *, every_n_steps: int, sequences: int, window: int, max_slots: int | None) -> None:
        numbers = {"every_n_steps": every_n_steps, "sequences": sequences, "window": window}
        for name, value in {**numbers, **({} if max_slots is None else {"max_slots": max_slots})}.items():
            check_integer(f"{_KEY}.{name}", value, low=1)
        self.every_n_steps, self.sequences, self.window, self.max_slots = every_n_steps, sequences, window, max_slots
        self._reads: RowReads | None = None
        self._now: BackgroundCounter | None = None
        self._before: BackgroundCounter | None = None
        self._counted_steps, self._last_step = 0, -1
        self._saved: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count, if the model reads tables and is not being finetuned."""
        assert isinstance(pl_module, LanguageModule)
        # A finetuned run keeps the background that its choice of rows is compared with.
        if pl_module.config.get("finetune"):
            return
        reads = RowReads(pl_module.model, max_rows=self.max_slots)
        if not reads.sets:
            return
        self._reads, device = reads, trainer.strategy.root_device
        self._now, self._before = (BackgroundCounter(reads.rows, device) for _ in range(2))
        saved, self._saved = self._saved, {}
        if not saved:
            return
        now, both = (ReadBackground.from_state(saved[name]) for name in ("now", "background"))
        if {name: len(values) for name, values in both.batches.items()} != reads.rows:
            _log.warning("the checkpoint counts the reads of other tables: the read background begins anew")
            return
        self._counted_steps = saved["counted_steps"]
        # The saved sums are over all ranks, so only one rank may continue from them.
        if not is_distributed() or trainer.is_global_zero:
            self._now.load(now)
            self._before.load(both.without(now))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Watches the first micro-batch of a step that is counted: plugins fill no traces for it in the others."""
        step = trainer.global_step + 1
        if self._now is None or (step - 1) % self.every_n_steps or step == self._last_step:
            return
        assert isinstance(pl_module, LanguageModule)
        self._last_step = step
        pl_module.watch.watchers.append(self._count)

    def _count(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        assert self._reads is not None
        assert self._now is not None
        self._now.add(self._reads.of_traces(traces, batch), most=self.sequences)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Ends the count of the micro-batch, and forgets the older half when a window is full."""
        if not self._stop(pl_module):
            return
        self._counted_steps += 1
        # By steps, which are the same on all ranks.
        if self._counted_steps % math.ceil(self.window / (self.sequences * trainer.world_size)) == 0:
            self._begin_window()

    def _begin_window(self) -> None:
        assert self._now is not None
        assert self._before is not None
        self._now, self._before = self._before, self._now
        self._now.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops watching."""
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops watching."""
        self._stop(pl_module)

    def _stop(self, pl_module: L.LightningModule) -> bool:
        """Stops watching; returns whether a micro-batch was watched."""
        assert isinstance(pl_module, LanguageModule)
        if self._count not in pl_module.watch.watchers:
            return False
        pl_module.watch.watchers.remove(self._count)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, summed over the ranks. Collective: call on all ranks."""
        if self._now is None or self._before is None:
            return self._saved
        now = self._now.background()
        both = now.joined(self._before.background())
        return {"background": both.state_dict(), "now": now.state_dict(), "counted_steps": self._counted_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the counts until training starts: the model may not be built yet."""
        self._saved = state
