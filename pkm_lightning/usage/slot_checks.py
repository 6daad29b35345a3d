"""Refuses slots and traces of a plugin that do not belong together, in one sentence that names the plugin.

Letters: B sequences, T tokens, H heads, K slots a head, N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pkm_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkm_lightning.ffn import Slots

_REMEDY = "mend the plugin, or say ~callbacks.slot_usage."
_KINDS = ("_ids", "_chosen")


def check_slots(place: str, plugin: nn.Module, told: Sequence[Slots]) -> None:
    """What a plugin's `slots()` has told.

    Args:
        place: of the plugin, as in the names of readers: `layer3` or `layer3.variant`.

    Raises:
        ConfigError: two of one name, no slots, or a number that is not that of the sub-keys or of the tables' rows.
    """
    who = f"{place}: slots() of {type(plugin).__name__}"
    names = [slots.name for slots in told]
    for slots in told:
        if names.count(slots.name) > 1:
            raise ConfigError(
                f"{who} names {slots.name!r} {names.count(slots.name)} times; give each a name of its own."
            )
        if slots.count < 1:
            raise ConfigError(f"{who} says that {slots.name!r} has count={slots.count}; allowed: 1 to inf, {_REMEDY}")
        if slots.n_keys is not None and slots.n_keys**2 != slots.count:
            raise ConfigError(
                f"{who} says that {slots.name!r} has count={slots.count} and n_keys={slots.n_keys}, but pairs of "
                f"sub-keys are n_keys**2 = {slots.n_keys**2}; set n_keys=None, or {_REMEDY}"
            )
        rows = [table.rows for table in slots.tables]
        if any(n != slots.count for n in rows):
            raise ConfigError(
                f"{who} says that {slots.name!r} has count={slots.count}, but its tables have {rows} rows; {_REMEDY}"
            )


def check_trace(
    place: str, plugin: nn.Module, slots: Slots, trace: dict[str, Tensor], batch: dict[str, Tensor], told: Sequence[str]
) -> None:
    """What a plugin has traced of `slots`, whose names are all in `told`; only shapes, no value is looked at.

    Raises:
        ConfigError: names or shapes that are not those that `reads` needs.
    """
    name, who = slots.name, f"{place}: {type(plugin).__name__}"
    kind = next((kind for kind in _KINDS if name + kind in trace), None)
    if kind is None:
        others = [key for key in trace if key.endswith(_KINDS) and key.rpartition("_")[0] not in told]
        if others:
            raise ConfigError(
                f"{who} traces {', '.join(others)}, but its slots() names {name!r}; trace {name}_ids (or "
                f"{name}_chosen) with {name}_weights.{nearest(name, [key.rpartition('_')[0] for key in others])}"
            )
        return
    found, weights = trace[name + kind], trace.get(f"{name}_weights")
    if weights is None or weights.shape != found.shape:
        has = "none" if weights is None else f"{name}_weights of shape {tuple(weights.shape)}"
        raise ConfigError(
            f"{who} traces {name}{kind} of shape {tuple(found.shape)}, which need {name}_weights of that shape, and "
            f"has {has}; {_REMEDY}"
        )
    _check_shape(f"{who} traces {name}{kind}", kind, slots.count, found, batch)


def _check_shape(what: str, kind: str, count: int, found: Tensor, batch: dict[str, Tensor]) -> None:
    integers = (torch.int32, torch.int64)
    if kind == "_ids":
        fits, form = (
            found.ndim in (3, 4) and found.dtype in integers,
            "int32 or int64 of shape (B, T, K) or (B, T, H, K)",
        )
    else:
        fits, form = found.shape[2:] == (count,) and found.dtype is torch.bool, f"bool of shape (B, T, {count})"
    if not fits:
        raise ConfigError(f"{what} as {found.dtype} of shape {tuple(found.shape)}; allowed: {form}, {_REMEDY}")
    of_batch = batch.get("valid", batch.get("input_ids"))
    if of_batch is not None and found.shape[:2] != of_batch.shape:
        raise ConfigError(
            f"{what} of shape {tuple(found.shape)}, but the micro-batch has (B, T) = {tuple(of_batch.shape)}; {_REMEDY}"
        )
