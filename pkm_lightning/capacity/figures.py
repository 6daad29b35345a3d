"""The plan of a run: memory and communication of one device, summed over the dense part and the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from pkm_lightning.capacity.activations import activations
from pkm_lightning.capacity.dense import dense_figures
from pkm_lightning.capacity.setting import Setting
from pkm_lightning.capacity.tables import TableFigures, table_figures
from pkm_lightning.usage.read_counts import BYTES_PER_SLOT
from pkm_lightning.usage.slot_readers import find_readers

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device; None: unknown."""

    dense_weights: int | None
    dense_gradients: int | None
    dense_states: int | None
    gathered_weights: int | None
    activations: int | None
    logits: int | None
    table_part: int
    table_gradients: int
    table_states: int
    staged_reads: int | None
    merged_replicas: int | None
    usage_counters: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one device receives per optimizer step; None: unknown."""

    dense: int | None
    table_forward: int | None
    table_backward: int | None
    replicas: int | None
    row_statistics: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory and traffic of one device of a run.

    Args:
        setting: ranks, strategy, batches.
        memory: on the device.
        host: in host memory per rank, with `table.device=cpu`; 0 for figures on the device.
        traffic: per step.
        unknown: plugin classes without `reads()`.
    """

    setting: Setting
    memory: Memory
    host: Memory
    traffic: Traffic
    unknown: tuple[str, ...] = ()

    @property
    def memory_total(self) -> int:
        """The sum of the known figures on the device."""
        return total(self.memory)

    @property
    def host_total(self) -> int:
        """The sum of the known figures in host memory."""
        return total(self.host)

    @property
    def traffic_total(self) -> int:
        """The sum of the known traffic."""
        return total(self.traffic)


def amount(size: float) -> str:
    """Returns `size`, in bytes, in a unit in which it is not 0.0."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale / 10:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def total(figures: Memory | Traffic) -> int:
    """Returns the sum of the known figures."""
    return sum(value or 0 for value in asdict(figures).values())


def make_plan(model: Transformer, config: Mapping[str, Any]) -> Plan:
    """Returns the plan of a completed configuration.

    Args:
        model: as one process would build it, on the meta device; the plan depends on its shapes only.
        config: with trainer, strategy, table and data.
    """
    setting = Setting.of(config)
    dense = dense_figures(model, setting)
    tables, on_host, unknown = table_figures(model, setting)
    if setting.on_host:  # the host is the device
        tables, on_host = tables + on_host, TableFigures()
    all_tables = tables + on_host
    of_batch = activations(model, setting)
    on_device = Memory(
        dense_weights=None if dense is None else dense.weights,
        dense_gradients=None if dense is None else dense.gradients,
        dense_states=None if dense is None else dense.states,
        gathered_weights=None if dense is None else dense.gathered,
        activations=of_batch.kept,
        logits=of_batch.logits,
        **_held(tables),
        usage_counters=_usage_counters(model, config),
    )
    nothing = {field.name: 0 for field in fields(Memory)}
    host = Memory(**{**nothing, **_held(on_host)})
    return Plan(
        setting=setting,
        memory=on_device,
        host=host,
        traffic=Traffic(
            dense=None if dense is None else dense.received,
            table_forward=all_tables.forward,
            table_backward=all_tables.backward,
            replicas=all_tables.replicas,
            row_statistics=all_tables.statistics,
        ),
        unknown=unknown,
    )


def _held(tables: TableFigures) -> dict[str, Any]:
    """Returns the figures of `Memory` about tables."""
    return {
        "table_part": tables.part,
        "table_gradients": tables.gradients,
        "table_states": tables.states,
        "staged_reads": tables.staged,
        "merged_replicas": tables.merged,
    }


def _usage_counters(model: Transformer, config: Mapping[str, Any]) -> int:
    """Returns the bytes of the counters of `callbacks.slot_usage`, where it is on; every rank has all of them."""
    usage = (config.get("callbacks") or {}).get("slot_usage")
    if not usage:
        return 0
    readers = find_readers(model, usage.get("max_slots")).values()
    return sum(BYTES_PER_SLOT * reader.slots.count for reader in readers)
