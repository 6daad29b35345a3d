"""What the memory layers of any module read, in loops of users: forward hooks that pass on the trace of each forward.

Layers are numbered in the order of `model.modules()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from pkm_lightning.ffn import NO_CONTEXT, FFNOutput, HasSlots, replaced

#: Takes the number of a layer, its trace for tokens laid end to end, (1, T, ...), `valid` (1, T) where there is
#: padding, and the number of sequences that T consists of.
OnRead = Callable[[int, dict[str, Tensor], dict[str, Tensor], int], None]


class LayerReads:
    """Hooks on the memory layers of a module, until `close`.

    Args:
        model: a module with memory layers anywhere in it.
        on_read: called after each forward of a layer that is observed.
        observes: whether a forward of a layer that begins is observed.
    """

    def __init__(self, model: nn.Module, on_read: OnRead, *, observes: Callable[[nn.Module], bool]) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, HasSlots)]
        self._on_read, self._observes = on_read, observes
        self._hooks = [hook for number, layer in enumerate(self._layers) for hook in self._hooks_of(number, layer)]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers)

    def plugins(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields number, name within the layer and module of each, as `Transformer.plugins` does."""
        for number, layer in enumerate(self._layers):
            yield number, "ffn", layer

    def _hooks_of(self, number: int, layer: nn.Module) -> Iterator[Any]:
        def observed(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            context = keywords.get("context", inputs[1] if len(inputs) > 1 else NO_CONTEXT)
            observe = self._observes(layer) or context.observe
            return inputs[:1], {**keywords, "context": replaced(context, observe=observe)}

        def pass_on(layer: nn.Module, _: Any, keywords: dict[str, Any], output: FFNOutput) -> None:
            if not self._observes(layer):
                return
            # As one sequence, (1, T, ...): a layer may be called with (T, D) too.
            tokens = output.y_BTD.shape[:-1]
            trace = {
                name: value.flatten(0, len(tokens) - 1)[None]
                for name, value in output.trace.items()
                if value.shape[: len(tokens)] == tokens
            }
            valid_BT = keywords["context"].valid_BT
            batch = {} if valid_BT is None else {"valid": valid_BT.reshape(1, -1)}
            self._on_read(number, trace, batch, tokens[:-1].numel())

        yield layer.register_forward_pre_hook(observed, with_kwargs=True)
        yield layer.register_forward_hook(pass_on, with_kwargs=True)

    def close(self) -> None:
        """Removes the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
