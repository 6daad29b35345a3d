"""All counters of a run: one `ReadCounts` a reader, their sums over the ranks, and their place in a checkpoint.

They count time by a clock of their own, steps that were watched: it only grows, where a rollback sets
`trainer.global_step` back and repeats steps. Until the first rollback both are the same number.

Letters: N slots, S sub-keys a half, T tokens, H heads, K slots a head.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.errors import CheckpointError
from pkm_lightning.model import Traces, Transformer
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.usage.head_counts import HeadCounts, PerHead, counts_heads
from pkm_lightning.usage.read_counts import Counted, ReadCounts
from pkm_lightning.usage.slot_metrics import effective_slots
from pkm_lightning.usage.slot_readers import Reader, Reads, find_readers, find_tables
from pkm_lightning.usage.windowed_sums import WindowedSums

_log = logging.getLogger(__name__)
#: What 1 of a sum of effective slots stands for.
EFFECTIVE_UNIT = 2.0**-16
Span = Literal["window", "ever"]


class UsageCounters:
    """Counts on each rank for itself; what needs all ranks says so, and every rank must call it.

    Args:
        model: whose reads are counted.
        window: steps of the sliding window; an odd number counts as the next.
        per_head: what of each head is counted too; None: nothing.
        device: where traces are.
        step: steps taken already.
        max_slots: reads of more slots are not counted; None: all are.

    Attributes:
        clock: the step that is being watched, or the last one; steps that a rollback repeats count again.
        readers: by name.
        tables: sets of tables by name.
        counts: of each reader by name.
        heads: of each reader's heads, where asked for; they appear with the first read.
        effective: of each reader that reads several slots at once, the sum over reads of their effective number of
            slots, in units of 2**-16, and the number of these reads; they appear with the first such read.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        window: int,
        per_head: PerHead | None,
        device: torch.device,
        step: int,
        max_slots: int | None = None,
    ) -> None:
        self.readers = find_readers(model, max_slots)
        self.tables = find_tables(self.readers)
        self._half, self._per_head, self._device, self._start = -(-window // 2), per_head, device, step
        self.clock, self._in_step = step, False
        self.counts = {
            name: ReadCounts(reader.slots.count, half=self._half, device=device, step=step)
            for name, reader in self.readers.items()
        }
        self.heads: dict[str, HeadCounts] = {}
        self._saved_heads: dict[str, Any] = {}
        self.effective: dict[str, WindowedSums] = {}
        self._silent: set[str] = set()

    def add(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Counts a micro-batch, the first since `end_step` as that of a new step; nothing waits for the device."""
        if not self._in_step:
            self.clock, self._in_step = self.clock + 1, True
        for name, reader in self.readers.items():
            reads = reader.reads(traces, batch)
            if reads is None:
                self._say_silent(name)
                for counts in (self.counts[name], *([self.heads[name]] if name in self.heads else [])):
                    counts.turn(self.clock)
                continue
            self.counts[name].add(reads.ids_THK.flatten(1), reads.weights_THK.flatten(1), reads.valid_T, self.clock)
            self._add_heads(reader, reads)
        for sums in self.effective.values():
            sums.turn(self.clock)

    def add_effective(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Sums up the effective slots of a micro-batch that `add` has counted; nothing waits for the device."""
        for name, reader in self.readers.items():
            reads = reader.reads(traces, batch)
            if reads is not None and not reads.slots_choose:
                total_2 = effective_slots(reads.weights_THK, reads.valid_T)
                # Whole numbers: a sum has no order, so that resumes and splits over ranks change nothing.
                total_2[0] = (total_2[0] / EFFECTIVE_UNIT).round()
                self._effective(name).now.add_(total_2.long())

    def _effective(self, name: str) -> WindowedSums:
        if name not in self.effective:
            self.effective[name] = WindowedSums((2,), half=self._half, device=self._device, step=self._start)
            self.effective[name].turn(self.clock)
        return self.effective[name]

    def end_step(self) -> None:
        """What is counted next belongs to another step."""
        self._in_step = False

    def _say_silent(self, name: str) -> None:
        if name not in self._silent:
            self._silent.add(name)
            slots = self.readers[name].slots.name
            _log.warning(
                "%s: nothing is traced as %s_ids or %s_chosen, so no read of it is counted", name, slots, slots
            )

    def _add_heads(self, reader: Reader, reads: Reads) -> None:
        name, heads = reader.name, reads.ids_THK.shape[1]
        if self._per_head is None or not counts_heads(reader.slots, heads, self._per_head):
            return
        if name not in self.heads:
            self.heads[name] = HeadCounts(
                reader.slots, heads=heads, kind=self._per_head, half=self._half, device=self._device, step=self._start
            )
            if name in self._saved_heads:
                self._load(self.heads[name], self._saved_heads.pop(name), f"{name} by head")
        self.heads[name].add_reads(reads, self.clock)

    # --- sums over the ranks

    def total(self, name: str, span: Span) -> Counted:
        """Reads of a reader, or of a set of tables by all its readers, on all ranks."""
        own = [getattr(self.counts[reader], span)() for reader in self._sharing(name)]
        return _summed(torch.stack([torch.stack(list(counted)) for counted in own]).sum(0))

    def total_of_heads(self, name: str, span: Span) -> Counted:
        """Reads by all heads of a reader, each counter for itself, on all ranks; see `HeadCounts` for their order."""
        return _summed(torch.stack(list(getattr(self.heads[name], span)())))

    def n_keys(self, name: str) -> int | None:
        """Sub-keys a half of the slots of a reader or of a set of tables, where all take them for pairs of sub-keys."""
        found = {self.readers[reader].slots.n_keys for reader in self._sharing(name)}
        return found.pop() if len(found) == 1 else None

    def last_read(self, name: str) -> Tensor:
        """Last step of the clock that any rank and, of a set of tables, any layer has read a slot, (N,) int32."""
        return _latest(torch.stack([self.counts[reader].last_N for reader in self._sharing(name)]).amax(0))

    def last_read_of_heads(self, name: str) -> Tensor:
        """Last step of the clock that any rank has read in, for each counter of `total_of_heads`, int32."""
        return _latest(self.heads[name].last_N)

    def mean_effective(self, name: str, span: Span) -> float:
        """Mean effective slots of a read of a reader, on all ranks; NaN without any."""
        total, reads = sum_over_ranks(getattr(self.effective[name], span)()).tolist()
        return total * EFFECTIVE_UNIT / reads if reads else math.nan

    def _sharing(self, name: str) -> tuple[str, ...]:
        return self.tables[name].readers if name in self.tables else (name,)

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Sums over the ranks: every rank must call it."""
        return {
            "clock": self.clock,
            "per_head": self._per_head,
            "counts": {name: _state(counts) for name, counts in self.counts.items()},
            "heads": {name: _state(counts) for name, counts in self.heads.items()} | self._saved_heads,
            "effective": {name: sums.state(sum_over_ranks(sums.amounts())) for name, sums in self.effective.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the sums, on one rank so that nothing counts twice; heads begin anew with another `per_head`.

        Raises:
            CheckpointError: the checkpoint counts other slots than this model has.
        """
        saved = {name: len(counts["last"]) for name, counts in state["counts"].items()}
        own = {name: counts.n_slots for name, counts in self.counts.items()}
        if saved != own:
            raise CheckpointError(
                f"the checkpoint counts the reads of {_in_words(saved)}, but this model has {_in_words(own)}; give the "
                "configuration that the run was started with, or ~callbacks.slot_usage."
            )
        for name, counts in self.counts.items():
            self._load(counts, state["counts"][name], name)
        self._saved_heads = dict(state["heads"]) if self._per_head == state["per_head"] else {}
        self.clock = self._start = state["clock"]
        for name, saved in state["effective"].items():
            self._effective(name).load(saved, holds_sums=_holds_sums())

    def _load(self, counts: ReadCounts, state: dict[str, Any], name: str) -> None:
        if len(state["last"]) != counts.n_slots:
            raise CheckpointError(
                f"the checkpoint has {len(state['last'])} counters for {name}, this model {counts.n_slots}; give the "
                "configuration that the run was started with, or ~callbacks.slot_usage."
            )
        counts.load(state, holds_sums=_holds_sums())


def _state(counts: ReadCounts) -> dict[str, Any]:
    return counts.state(sum_over_ranks(counts.amounts()), _latest(counts.last_N))


def _in_words(slots: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in slots.items()) or "nothing"


def _summed(own_2N: Tensor) -> Counted:
    return Counted(*sum_over_ranks(own_2N))


def _latest(last_N: Tensor) -> Tensor:
    if not is_distributed():
        return last_N
    latest_N = last_N.clone()
    dist.all_reduce(latest_N, op=dist.ReduceOp.MAX)
    return latest_N


def _holds_sums() -> bool:
    return not is_distributed() or dist.get_rank() == 0
