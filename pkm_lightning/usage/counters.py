"""All counters of a run: one `ReadCounts` per reader, their sums over the ranks, and their state in a checkpoint.

Time is counted by a clock of their own, the number of steps that were watched. It only grows, while a rollback sets
`trainer.global_step` back and repeats steps; until the first rollback both are the same number.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from pkm_lightning.errors import CheckpointError
from pkm_lightning.model import Traces
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.usage.head_counts import HeadCounts, PerHead, counts_heads
from pkm_lightning.usage.read_counts import Counted, ReadCounts
from pkm_lightning.usage.slot_metrics import effective_slots
from pkm_lightning.usage.slot_readers import HasPlugins, Reader, Reads, find_readers, find_tables
from pkm_lightning.usage.windowed_sums import WindowedSums

_log = logging.getLogger(__name__)
#: The unit in which effective slots are summed.
EFFECTIVE_UNIT = 2.0**-16
Span = Literal["window", "ever"]


class UsageCounters:
    """The counters of one rank. Methods that return figures of all ranks are collective: call them on all ranks.

    Args:
        model: the model whose reads are counted.
        window: steps of the sliding window; an odd number counts as the next even one.
        per_head: what is also counted per head; None: nothing.
        device: the device of the traces.
        step: steps taken before.
        max_slots: reads of more slots are not counted; None: all are.

    Attributes:
        clock: the step that is being watched, or the last one; steps that a rollback repeats count again.
        readers: by name.
        tables: sets of tables by name.
        counts: the counters of each reader by name.
        heads: the counters per head of each reader, if `per_head`; they are made at the first read.
        effective: per reader that reads several slots at once, the sum over reads of their effective number of slots in
            units of 2**-16, and the number of these reads; they are made at the first such read.
    """

    def __init__(
        self,
        model: HasPlugins,
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
        self._untraced: set[str] = set()

    def add(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Counts a micro-batch, the first one after `end_step` as part of a new step; never waits for the device."""
        self._begin_step()
        for reader in self.readers.values():
            self._add_reads(reader, traces, batch)

    def add_layer(self, layer: int, trace: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Counts one forward of one layer, as `add` does where layers see other tokens or do not all run.

        Args:
            layer: its number.
            trace: of its plugin.
            batch: `valid` for its tokens, (B, T) bool, if there is padding.
        """
        self._begin_step()
        for reader in self.readers.values():
            if reader.layer == layer:
                self._add_reads(reader, {layer: trace}, batch)

    def _begin_step(self) -> None:
        """Moves the clock and all windows on, unless the step has begun."""
        if self._in_step:
            return
        self.clock, self._in_step = self.clock + 1, True
        every: list[ReadCounts | WindowedSums] = [
            *self.counts.values(), *self.heads.values(), *self.effective.values()
        ]  # fmt: skip
        for sums in every:
            sums.advance(self.clock)

    def _add_reads(self, reader: Reader, traces: Traces, batch: dict[str, Tensor]) -> None:
        name, reads = reader.name, reader.reads(traces, batch)
        if reads is None:
            self._warn_untraced(name)
            return
        self.counts[name].add(reads.ids_THK.flatten(1), reads.weights_THK.flatten(1), reads.valid_T, self.clock)
        self._add_heads(reader, reads)

    def add_effective(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Adds the effective slots of a micro-batch that `add` has counted; never waits for the device."""
        for name, reader in self.readers.items():
            reads = reader.reads(traces, batch)
            if reads is not None and not reads.slots_choose:
                total_2 = effective_slots(reads.weights_THK, reads.valid_T)
                # Sums of integers do not depend on their order, so resumes and splits over ranks change nothing.
                total_2[0] = (total_2[0] / EFFECTIVE_UNIT).round()
                self._effective(name).now.add_(total_2.long())

    def _effective(self, name: str) -> WindowedSums:
        if name not in self.effective:
            self.effective[name] = WindowedSums((2,), half=self._half, device=self._device, step=self._start)
            self.effective[name].advance(self.clock)
        return self.effective[name]

    def end_step(self) -> None:
        """Ends the step: the next micro-batch belongs to another one."""
        self._in_step = False

    def _warn_untraced(self, name: str) -> None:
        if name not in self._untraced:
            self._untraced.add(name)
            slots = self.readers[name].slots.name
            _log.warning("%s is not counted, since its plugin traces neither %s_ids nor %s_chosen", name, slots, slots)

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

    def total(self, name: str, span: Span) -> Counted:
        """Returns the reads of a reader on all ranks, or those of all readers of a set of tables."""
        local = [getattr(self.counts[reader], span)() for reader in self._readers_of(name)]
        return _summed(_joined([torch.stack(list(counted)) for counted in local]).sum(0))

    def total_of_heads(self, name: str, span: Span) -> Counted:
        """Returns the reads per head of a reader on all ranks; see `HeadCounts` for the order of the counters."""
        return _summed(torch.stack(list(getattr(self.heads[name], span)())))

    def n_keys(self, name: str) -> int | None:
        """Returns the sub-keys per half of a reader or set of tables; None unless its readers agree on them."""
        numbers = {self.readers[reader].slots.n_keys for reader in self._readers_of(name)}
        return numbers.pop() if len(numbers) == 1 else None

    def last_read(self, name: str) -> Tensor:
        """Returns the last step of the clock in which any rank and any reader of a set read each slot, (N,) int32."""
        return _latest(_joined([self.counts[reader].last_N for reader in self._readers_of(name)]).amax(0))

    def last_read_of_heads(self, name: str) -> Tensor:
        """Returns the same for each counter of `total_of_heads`, int32."""
        return _latest(self.heads[name].last_N)

    def mean_effective(self, name: str, span: Span) -> float:
        """Returns the mean effective number of slots per read of a reader on all ranks; NaN without any read."""
        total, reads = sum_over_ranks(getattr(self.effective[name], span)()).tolist()
        return total * EFFECTIVE_UNIT / reads if reads else math.nan

    def _readers_of(self, name: str) -> tuple[str, ...]:
        return self.tables[name].readers if name in self.tables else (name,)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums over the ranks. Collective: call on all ranks."""
        return {
            "clock": self.clock,
            "per_head": self._per_head,
            "counts": {name: _state(counts) for name, counts in self.counts.items()},
            "heads": {name: _state(counts) for name, counts in self.heads.items()} | self._saved_heads,
            "effective": {name: sums.state(sum_over_ranks(sums.amounts())) for name, sums in self.effective.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sums, on one rank so that nothing counts twice; with another `per_head` heads start empty.

        Raises:
            CheckpointError: the checkpoint counts other slots than this model has.
        """
        saved = {name: len(counts["last"]) for name, counts in state["counts"].items()}
        current = {name: counts.n_slots for name, counts in self.counts.items()}
        if saved != current:
            raise CheckpointError(
                f"the checkpoint counts the reads of {_in_words(saved)}, but this model has {_in_words(current)}; use "
                "the configuration that the run was started with, or set ~callbacks.slot_usage."
            )
        for name, counts in self.counts.items():
            self._load(counts, state["counts"][name], name)
        # The number of heads is only known at the first read.
        self._saved_heads = dict(state["heads"]) if self._per_head == state["per_head"] else {}
        self.clock = self._start = state["clock"]
        for name, sums in state["effective"].items():
            self._effective(name).load(sums, holds_sums=_holds_sums())

    def _load(self, counts: ReadCounts, state: dict[str, Any], name: str) -> None:
        if len(state["last"]) != counts.n_slots:
            raise CheckpointError(
                f"the checkpoint has {len(state['last'])} counters for {name}, this model {counts.n_slots}; use the "
                "configuration that the run was started with, or set ~callbacks.slot_usage."
            )
        counts.load(state, holds_sums=_holds_sums())


def _state(counts: ReadCounts) -> dict[str, Any]:
    return counts.state(sum_over_ranks(counts.amounts()), _latest(counts.last_N))


def _in_words(slots: dict[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in slots.items()) or "nothing"


def _joined(by_reader: list[Tensor]) -> Tensor:
    """Returns the counters of several readers as one tensor; readers of one table may have more and fewer slots."""
    longest = max(values.shape[-1] for values in by_reader)
    return torch.stack([pad(values, (0, longest - values.shape[-1])) for values in by_reader])


def _summed(local_2N: Tensor) -> Counted:
    return Counted(*sum_over_ranks(local_2N))


def _latest(last_N: Tensor) -> Tensor:
    if not is_distributed():
        return last_N
    latest_N = last_N.clone()
    dist.all_reduce(latest_N, op=dist.ReduceOp.MAX)
    return latest_N


def _holds_sums() -> bool:
    return not is_distributed() or dist.get_rank() == 0
