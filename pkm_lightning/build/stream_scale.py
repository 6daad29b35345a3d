"""The scale of plugins beside the FFNs of a pretrained model: that of the residual stream to which they add.

Plugins are drawn for a stream of length 1, as the embeddings of this package's own models have at first, and for inputs
of RMS 1. In SmolLM2-135M the stream is 83 long at the fifth layer and 739 at the last, and FFNs read inputs of RMS 0.09
to 0.39: rows that learn from zero at the rates of a training would be a thousandth of what is there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pkm_lightning.ffn import HasStreamScale
from pkm_lightning.model.plugin_checks import called

#: Sequences and tokens of each: enough for a median, and short enough for learned positions. Random tokens have streams
#: as long as those of text, within a quarter above the third layer of SmolLM2-135M (scripts/measure_stream.py).
_SHAPE = (4, 16)


class Place(NamedTuple):
    """A plugin whose output is zero, and what is measured for it.

    Attributes:
        plugin: left alone if it has no `match_stream`.
        block: its layer, whose first input is the residual stream.
        reader: a module with the plugin's first input, such as itself; None: the plugin reads behind a norm, RMS 1.
    """

    plugin: nn.Module
    block: nn.Module
    reader: nn.Module | None


def match_streams(model: nn.Module, embedding: nn.Embedding, places: Iterable[Place]) -> None:
    """Initialises plugins for the stream of their layers, by one forward of random tokens.

    Medians over tokens decide, since a few tokens have streams that are many times longer; they are rounded to powers
    of two, so that rounding errors of another machine hardly ever draw other weights. On the meta device, and where a
    median is zero or not finite, nothing is done.

    Args:
        model: takes token ids, (B, T), as its first input; plugins may stand in it already.
        embedding: of the tokens.
        places: of the plugins.

    Raises:
        ConfigError: the `match_stream` of a plugin fails.
    """
    matched = [place for place in places if isinstance(place.plugin, HasStreamScale)]
    if not matched or any(weight.is_meta for place in matched for weight in place.block.parameters()):
        return
    ids_BT = torch.randint(embedding.num_embeddings, _SHAPE, generator=torch.Generator().manual_seed(0), device="cpu")
    lengths: dict[nn.Module, float] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in {module for _, block, reader in matched for module in (block, reader) if module is not None}:
            stack.callback(module.register_forward_pre_hook(partial(_measure, lengths), with_kwargs=True).remove)
        stack.enter_context(_evaluating(model))
        model(ids_BT.to(embedding.weight.device))
    for plugin, block, reader in matched:
        stream, rms = lengths[block], 1.0 if reader is None else lengths[reader] / embedding.embedding_dim**0.5
        if 0 < stream < math.inf and 0 < rms < math.inf:
            scales = {"input_rms": _power_of_two(rms), "stream_length": _power_of_two(stream)}
            assert isinstance(plugin, HasStreamScale)
            called(f"{type(plugin).__name__}.match_stream", plugin.match_stream, **scales)


def _measure(
    lengths: dict[nn.Module, float], module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    x_BTD = inputs[0] if inputs else next(iter(named.values()))
    lengths[module] = x_BTD.float().norm(dim=-1).median().item()


def _power_of_two(value: float) -> float:
    return float(2.0 ** round(math.log2(value)))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model, with all of its parts, into evaluation mode within the block."""
    training = [part for part in model.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
