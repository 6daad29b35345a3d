"""Plugins in a decoder layer of transformers: in the place of its `mlp`, beside it, in front of the layer or behind it.

Nothing of transformers is imported. A layer keeps its parameters and their names; its class is replaced by a subclass,
as FSDP does it, whose `forward` also runs the plugins. They are then recomputed, compiled and sharded with the layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from pkm_lightning.ffn import NO_CONTEXT, FFNContext, FFNOutput, replaced
from pkm_lightning.model.block import run_plugin, stream_norm
from pkm_lightning.model.plugin_checks import checked_output

if TYPE_CHECKING:
    from pkm_lightning.model.cache import LayerCache


class PluginMLP(nn.Module):
    """A plugin in the place of an `mlp` of transformers, or beside it: `y = plugin(x)` or `y = base(x) + plugin(x)`.

    Args:
        plugin: an FFN plugin.
        base: the `mlp` that stays, or another `PluginMLP`; None: the plugin replaces it.

    Attributes:
        context: of the tokens of the next forward; a `PluggedLayer` sets it.
        output: of the last forward of the plugin, until the layer collects it.
    """

    def __init__(self, plugin: nn.Module, base: nn.Module | None = None) -> None:
        super().__init__()
        self.plugin, self.base = plugin, base
        self.context = NO_CONTEXT
        self.output: FFNOutput | None = None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Returns what the layer adds to its residual stream; what else the plugin reports stays in `output`."""
        # The base first: the recomputation of a checkpoint repeats random draws in this order.
        base_BTD = None if self.base is None else self.base(hidden_BTD)
        output = checked_output(self.plugin, hidden_BTD, self.plugin(hidden_BTD, self.context))
        self.output = output
        return output.y_BTD if base_BTD is None else base_BTD + output.y_BTD

    def enter(self, context: FFNContext) -> None:
        """Takes the context of the tokens of the next forward; parts of its past belong to the nested plugins."""
        if isinstance(self.base, PluginMLP):
            self.base.enter(_of_part("base", context))
            context = _of_part("variant", context)
        self.context = context

    def leave(self) -> dict[str, FFNOutput]:
        """Returns the outputs of the forward by the names of `named_plugins`, and forgets them and the context."""
        outputs = {name: place.output for name, place in self._places()}
        for _, place in self._places():
            place.context, place.output = NO_CONTEXT, None
        return {name: output for name, output in outputs.items() if output is not None}

    def named_plugins(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the plugins with their names within the layer, as `pkm_lightning.model.block.named_plugins` does."""
        for name, place in self._places():
            yield name, place.plugin

    def _places(self) -> list[tuple[str, PluginMLP]]:
        if isinstance(self.base, PluginMLP):
            return [("ffn.base", self.base), ("ffn.variant", self)]
        return [("ffn" if self.base is None else "ffn.variant", self)]


def _of_part(name: str, context: FFNContext) -> FFNContext:
    return context if context.past is None else replaced(context, past=context.past.part(name))


@dataclass
class DecoderCall:
    """One forward of a decoder: the tokens that its plugins see, and what they report.

    Attributes:
        context: of the tokens.
        caches: of the layers, by number, where a cache holds earlier tokens; else None.
        outputs: by the layer's number, of each plugin by its name within the layer.
    """

    context: FFNContext
    caches: Sequence[LayerCache] | None = None
    outputs: dict[int, dict[str, FFNOutput]] = field(default_factory=dict)


class PluggedLayer(nn.Module):
    """A decoder layer of transformers with plugins; `plugged` makes one out of a layer.

    Attributes:
        mlp: the layer's own, or a `PluginMLP`.
        before, after: plugins that add to the residual stream in front of the layer and behind it, or None; their input
            is normalised by `before_norm` and `after_norm` unless they do that themselves.
        number: of the layer.
        call: the forward that is under way, or None.
        collector: takes the layer and the outputs of its plugins, by name, after each forward; or None.
    """

    mlp: nn.Module
    before: nn.Module | None
    after: nn.Module | None
    before_norm: nn.Module | None
    after_norm: nn.Module | None
    number: int
    call: DecoderCall | None
    collector: Callable[[PluggedLayer, dict[str, FFNOutput]], None] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's hidden states, as the layer without plugins does; `call` takes what plugins report."""
        # Outside of compiled and recomputed code: a recomputed forward reports nothing a second time, and sees the
        # tokens of its own call.
        call = self.call
        context = NO_CONTEXT if call is None else call.context
        cached = None if call is None or call.caches is None else call.caches[self.number]
        hidden_BTD, outputs = super().__call__(*args, ffn_context=context, ffn_cache=cached, **kwargs)
        if call is not None:
            call.outputs[self.number] = outputs
        if self.collector is not None:
            self.collector(self, outputs)
        return cast("Tensor", hidden_BTD)

    def forward(
        self,
        hidden_BTD: Tensor,
        *args: Any,
        ffn_context: FFNContext = NO_CONTEXT,
        ffn_cache: LayerCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, FFNOutput]]:
        """Returns the hidden states and the outputs of the plugins by name, in the order in which they run."""
        outputs: dict[str, FFNOutput] = {}
        if self.before is not None:
            outputs["before"] = run_plugin("before", self.before, self.before_norm, hidden_BTD, ffn_context, ffn_cache)
            hidden_BTD = hidden_BTD + outputs["before"].y_BTD
        mlp = self.mlp
        if isinstance(mlp, PluginMLP):
            mlp.enter(ffn_context if ffn_cache is None else replaced(ffn_context, past=ffn_cache.past("ffn")))
        try:
            hidden_BTD = super().forward(hidden_BTD, *args, **kwargs)
        finally:  # a recomputed forward ends early, by an exception
            if isinstance(mlp, PluginMLP):
                outputs |= mlp.leave()
        if self.after is not None:
            outputs["after"] = run_plugin("after", self.after, self.after_norm, hidden_BTD, ffn_context, ffn_cache)
            hidden_BTD = hidden_BTD + outputs["after"].y_BTD
        return hidden_BTD, outputs

    def __reduce_ex__(self, protocol: Any) -> Any:
        # For pickle, which would look for the subclass by its name.
        base: Any = type(self).__bases__[-1]
        if type(self) is not _subclass(base):
            return super().__reduce_ex__(protocol)
        return _new, (base,), self.__getstate__()

    def named_plugins(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields the plugins with their names within the layer, in the order in which they run."""
        if self.before is not None:
            yield "before", self.before
        if isinstance(self.mlp, PluginMLP):
            yield from self.mlp.named_plugins()
        if self.after is not None:
            yield "after", self.after


def plug(layer: nn.Module, number: int, plugin: nn.Module, *, mode: str, dim: int, norm_eps: float) -> PluggedLayer:
    """Puts a plugin into a decoder layer of transformers, and returns the layer.

    Args:
        layer: with an `mlp`, called with hidden states (B, T, D) as its first argument; plugged already or not.
        number: of the layer.
        plugin: an FFN plugin, on the layer's device and in its dtype.
        mode: `replace`, `parallel`, `before` or `after`, as `placement.mode`.
        dim, norm_eps: size and epsilon of the norm in front of a plugin before or after the layer.
    """
    place = _plugged(layer, number)
    plugin.train(layer.training)
    if mode in ("replace", "parallel"):
        place.mlp = PluginMLP(plugin, None if mode == "replace" else place.mlp).train(layer.training)
        return place
    like = next(p for p in layer.parameters() if p.is_floating_point())  # quantised weights are integers
    norm = stream_norm(plugin, dim, norm_eps)
    setattr(place, f"{mode}_norm", None if norm is None else norm.to(like.device, like.dtype))
    setattr(place, mode, plugin)
    return place


def plugged_layers(model: nn.Module) -> list[PluggedLayer]:
    """Returns the layers of `model` that have plugins."""
    return [module for module in model.modules() if isinstance(module, PluggedLayer)]


@contextlib.contextmanager
def decoder_call(
    layers: Iterable[PluggedLayer], context: FFNContext, caches: Sequence[LayerCache] | None = None
) -> Iterator[DecoderCall]:
    """Gives the plugins of `layers` the context of a forward, and collects their outputs, within the block."""
    call, chosen = DecoderCall(context, caches), list(layers)
    for layer in chosen:
        layer.call = call
    try:
        yield call
    finally:
        for layer in chosen:
            layer.call = None


def _plugged(layer: nn.Module, number: int) -> PluggedLayer:
    """Returns `layer` itself, after the exchange of its class."""
    if not isinstance(layer, PluggedLayer):
        cls: Any = type(layer)
        layer.__class__ = _subclass(cls)
        assert isinstance(layer, PluggedLayer)
        layer.before = layer.after = layer.before_norm = layer.after_norm = None
        layer.number, layer.call, layer.collector = number, None, None
    return layer


@functools.cache
def _subclass(cls: Any) -> type[nn.Module]:
    return type(f"Plugged{cls.__name__}", (PluggedLayer, cls), {"__module__": cls.__module__})


def _new(cls: Any) -> nn.Module:
    plugged = _subclass(cls)
    return plugged.__new__(plugged)
