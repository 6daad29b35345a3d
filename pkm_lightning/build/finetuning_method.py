"""The contract between the builder and a method of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from pkm_lightning.model import Transformer


@runtime_checkable
class FinetuningMethod(Protocol):
    """The contract of a class that `finetune._target_` names."""

    def adapt(self, model: nn.Module) -> None:
        """Changes a trunk before it gets its weights: freezes parameters, or adds some for every use of the run."""

    def check(self, model: Transformer, config: Mapping[str, Any]) -> None:
        """Refuses an adapted trunk that it cannot train by `config`, with a PkmError; for other uses it may serve."""

    def callbacks(self) -> list[L.Callback]:
        """Returns what acts while the run is trained."""
