"""The contract of a strategy whose engine holds the dense parameters and their gradients, as DeepSpeed's does.

Training reaches such gradients through this contract only, and never through `parameter.grad`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """A strategy with an engine that holds gradients and steps the optimizer.

    Attributes:
        owns_parameters: the engine takes every registered parameter, so that tables must not be registered; a class
            attribute, since callbacks check a configuration by the strategy's class, before there is an object.
    """

    owns_parameters: bool

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients that the engine holds. Collective: call on all ranks."""

    def gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the gradients at the end of a step's backward. Collective: call on all ranks."""

    def drop_gradients(self) -> None:
        """Ends the step without an update and forgets its gradients."""


def engine_of(trainer: L.Trainer) -> Engine | None:
    """Returns the strategy of `trainer` if its engine owns the parameters, else None."""
    strategy = trainer.strategy
    return strategy if isinstance(strategy, Engine) and strategy.owns_parameters else None
