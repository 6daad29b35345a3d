"""The queries of the last micro-batch, which a revival of sub-keys aims at.

Letters: P values of a half key; a 2 is the two halves of a product key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from pkm_lightning.memory.addressing import Addressing


class Queries(NamedTuple):
    """The queries of one forward of a layer."""

    q_TH2P: Tensor
    #: False at padding, (T,), or None.
    valid_T: Tensor | None


class QueryRecorder:
    """Keeper of the queries of product-key layers, by forward hooks on their query networks.

    Args:
        addressing: the product-key retrieval of each layer, by the name of its reader.

    Attributes:
        queries: those of the last recorded forward, by name.
    """

    def __init__(self, addressing: Mapping[str, Addressing]) -> None:
        self.addressing = dict(addressing)
        self.queries: dict[str, Queries] = {}
        self._hooks: list[Any] = []

    def begin(self, is_due: Callable[[], bool]) -> None:
        """Starts to record the forwards in training for which `is_due` returns True."""

        def hook_of(name: str) -> Any:
            def record(query: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
                # Not the extra forward of the diagnostics, which is in evaluation mode.
                if query.training and is_due():
                    self.queries[name] = Queries(output[0].detach(), inputs[1] if len(inputs) > 1 else None)

            return record

        self._hooks = [part.query.register_forward_hook(hook_of(name)) for name, part in self.addressing.items()]

    def end(self) -> None:
        """Removes the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
