"""Events of the model itself: parameters that are not finite, diagnostics above their limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.event_log import Event
from pkm_lightning.errors import check_choice
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import largest_values, local_weights


def weight_events(pl_module: LanguageModule, step: int) -> list[Event]:
    """Returns the event of the first parameter that is not finite, if there is one. Collective: call on all ranks.

    Its value is the largest absolute value of that parameter, infinite with several ranks.
    """
    named = local_weights(pl_module)
    values = largest_values(list(named.values()))
    if pl_module.trainer.world_size > 1:
        # A maximum over ranks may lose NaN, so every value that is not finite becomes inf.
        values = torch.where(values.isfinite(), torch.zeros_like(values), torch.full_like(values, float("inf")))
        values = values.to(pl_module.device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    broken = [(name, v) for name, v in zip(named, values.tolist(), strict=True) if not math.isfinite(v)]
    return [Event("weight_not_finite", step, value, layer=name) for name, value in broken[:1]]


def limit_events(diagnostics: Diagnostics | None, limits: Mapping[str, float], step: int) -> Iterator[Event]:
    """Yields an event per layer and figure of `step` that is above its limit, or not a number.

    Raises:
        ConfigError: a limit of a figure that `diagnostics` does not know.
    """
    if diagnostics is None or diagnostics.step != step:
        return
    known = {name for values in diagnostics.figures.values() for name in values}
    for name, limit in limits.items():
        check_choice("callbacks.instability.limits: figure", name, sorted(known))
        for layer, values in diagnostics.figures.items():
            value = float(values[name]) if name in values else limit
            # Not `value > limit`, which is false for NaN.
            if not value <= limit:
                yield Event("limit", step, value, name, layer, limit)
