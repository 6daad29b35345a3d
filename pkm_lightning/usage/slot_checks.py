"""Refusal of slots and traces of a plugin that do not match, in one sentence that names the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pkm_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkm_lightning.ffn import Slots

_REMEDY = "correct the plugin, or set ~callbacks.slot_usage."
_KINDS = ("_ids", "_chosen")


def check_slots(place: str, plugin: nn.Module, declared: Sequence[Slots]) -> None:
    """Refuses what the `slots()` of a plugin return if it is inconsistent.

    Args:
        place: the plugin's place, as in the names of readers: `layer3` or `layer3.variant`.
        plugin: the plugin, for the message.
        declared: its slots.

    Raises:
        ConfigError: two of one name, no slots, or a number that is not that of the sub-keys or of the tables' rows.
    """
    where = f"{place}: slots() of {type(plugin).__name__}"
    names = [slots.name for slots in declared]
    for slots in declared:
        entry = f"{where} has {slots.name!r} with count={slots.count}"
        entry += f" and padding={slots.padding}" if slots.padding else ""
        if names.count(slots.name) > 1:
            raise ConfigError(f"{where} has {slots.name!r} {names.count(slots.name)} times; give each another name.")
        if slots.count < 1:
            raise ConfigError(f"{entry}; allowed: 1 or more, {_REMEDY}")
        if slots.n_keys is not None and slots.n_keys**2 != slots.count:
            raise ConfigError(
                f"{entry} and n_keys={slots.n_keys}, but pairs of sub-keys are n_keys**2 = {slots.n_keys**2}; set "
                f"n_keys=None, or {_REMEDY}"
            )
        rows = [table.rows for table in slots.tables]
        if any(n != slots.count + slots.padding for n in rows):
            raise ConfigError(f"{entry}, but its tables have {rows} rows; {_REMEDY}")


def check_trace(
    place: str,
    plugin: nn.Module,
    slots: Slots,
    trace: dict[str, Tensor],
    batch: dict[str, Tensor],
    names: Sequence[str],
) -> None:
    """Refuses a trace that does not match `slots`; looks at shapes only, so that nothing waits for the device.

    Args:
        place, plugin: as of `check_slots`.
        slots: the slots to find in the trace.
        trace: the plugin's trace of a micro-batch.
        batch: the micro-batch.
        names: names of all slots of the plugin.

    Raises:
        ConfigError: names or shapes in the trace are not those that `Reader.reads` needs.
    """
    # Slots that are not traced are allowed, but a trace of unknown name is probably misspelled.
    name, who = slots.name, f"{place}: {type(plugin).__name__}"
    kind = next((kind for kind in _KINDS if name + kind in trace), None)
    if kind is None:
        others = [key for key in trace if key.endswith(_KINDS) and key.rpartition("_")[0] not in names]
        if others:
            raise ConfigError(
                f"{who} traces {', '.join(others)}, but its slots() names {name!r}; trace {name}_ids (or "
                f"{name}_chosen) with {name}_weights.{nearest(name, [key.rpartition('_')[0] for key in others])}"
            )
        return
    traced, weights = trace[name + kind], trace.get(f"{name}_weights")
    if weights is None or weights.shape != traced.shape:
        has = "none" if weights is None else f"{name}_weights of shape {tuple(weights.shape)}"
        raise ConfigError(
            f"{who} traces {name}{kind} of shape {tuple(traced.shape)}, which need {name}_weights of that shape, and "
            f"has {has}; {_REMEDY}"
        )
    _check_shape(f"{who} traces {name}{kind}", kind, slots.count, traced, batch)


def _check_shape(what: str, kind: str, count: int, traced: Tensor, batch: dict[str, Tensor]) -> None:
    integers = (torch.int32, torch.int64)
    if kind == "_ids":
        fits = traced.ndim in (3, 4) and traced.dtype in integers
        allowed = "int32 or int64 of shape (B, T, K) or (B, T, H, K)"
    else:
        fits = traced.shape[2:] == (count,) and traced.dtype is torch.bool
        allowed = f"bool of shape (B, T, {count})"
    if not fits:
        raise ConfigError(f"{what} as {traced.dtype} of shape {tuple(traced.shape)}; allowed: {allowed}, {_REMEDY}")
    # Whichever the batch has; without both there is nothing to compare with.
    tokens = batch.get("valid", batch.get("input_ids"))
    if tokens is not None and traced.shape[:2] != tokens.shape:
        raise ConfigError(
            f"{what} of shape {tuple(traced.shape)}, but the micro-batch has (B, T) = {tuple(tokens.shape)}; {_REMEDY}"
        )
