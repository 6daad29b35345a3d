"""Leaves the figures that Lightning logs where they are, which is a tenth of the time of a short fit.

For every figure that it logs first, Lightning searches all attributes of its metric for tensors that it could move to
the device of the value. Where all tensors are on the CPU it finds none to move.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

CPU = torch.device("cpu")


def leave_on_the_cpu() -> None:
    """Replaces the move of a metric to the CPU, where it was made, by nothing; other moves stay."""
    move = _ResultMetric.to

    @functools.wraps(move)
    def moved(self: _ResultMetric, *to: Any, **options: Any) -> _ResultMetric:
        if not torch.cuda.is_available() and to == (CPU,) and not options:
            return self
        return move(self, *to, **options)

    _ResultMetric.to = moved
