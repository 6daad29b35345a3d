"""The queries of the last micro-batch, which a revival of sub-keys aims at.

Letters: P values of a half key; a 2 is the two halves of a product key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from pkm_lightning.memory.addressing import Addressing
    from pkm_lightning.model import Traces


class QueryRecorder:
    """Keeper of the queries of product-key layers, by forward hooks on their query networks.

    Args:
        addressing: the product-key retrieval of each layer, by the name of its reader.

    Attributes:
        queries: q_TH2P of the last recorded forward, by name.
        valid_T: False at padding in the last micro-batch, (T,), or None.
    """

    def __init__(self, addressing: Mapping[str, Addressing]) -> None:
        self.addressing = dict(addressing)
        self.queries: dict[str, Tensor] = {}
        self.valid_T: Tensor | None = None
        self._hooks: list[Any] = []

    def begin(self, is_due: Callable[[], bool]) -> None:
        """Starts to record the forwards in training for which `is_due` returns True."""

        def hook_of(name: str) -> Any:
            def record(query: nn.Module, _: Any, output: tuple[Tensor, Any]) -> None:
                # Not the extra forward of the diagnostics, which is in evaluation mode.
                if query.training and is_due():
                    self.queries[name] = output[0].detach()

            return record

        self._hooks = [part.query.register_forward_hook(hook_of(name)) for name, part in self.addressing.items()]

    def watch(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Keeps the padding of a micro-batch; a watcher of `pkm_lightning.training.step.StepWatch`."""
        self.valid_T = batch["valid"].flatten() if "valid" in batch else None

    def end(self) -> None:
        """Removes the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
