"""The scale of plugins beside the FFNs of a pretrained model: that of the residual stream to which they add.

Plugins are drawn for a stream of length 1, as the embeddings of this package's own models have at first, and for inputs
of RMS 1. In SmolLM2-135M the stream is 80 to 700 long, and its FFNs read inputs of RMS 0.1 to 0.4: rows that learn from
zero at the rates of a training would be a thousandth of what is there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.ffn import HasStreamScale
from pkm_lightning.model.plugin_checks import called

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Sequences and tokens of each: enough for a median, and short enough for learned positions. Random tokens have streams
#: as long as those of text, within a quarter above the third layer of SmolLM2-135M (scripts/measure_stream.py).
_SHAPE = (4, 16)


def match_streams(
    model: nn.Module, blocks: nn.ModuleList, embedding: nn.Embedding, plugins: Mapping[int, Sequence[nn.Module]]
) -> None:
    """Initialises plugins for the stream of their layers, by one forward of random tokens.

    Medians over tokens decide, since a few tokens have streams that are many times longer; they are rounded to powers
    of two, so that rounding errors of another machine draw the same weights. On the meta device nothing is done.

    Args:
        model: takes token ids, (B, T), as its first input.
        blocks: its layers; each takes the residual stream as its first input.
        embedding: of the tokens.
        plugins: by the number of their layer, with outputs of zero; those without `match_stream` are left alone.
    """
    matched = [
        (blocks[layer], plugin)
        for layer, of_one in plugins.items()
        for plugin in of_one
        if isinstance(plugin, HasStreamScale)
    ]
    if not matched or any(weight.is_meta for weight in blocks.parameters()):
        return
    ids_BT = torch.randint(embedding.num_embeddings, _SHAPE, generator=torch.Generator().manual_seed(0), device="cpu")
    seen: dict[nn.Module, Tensor] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in {module for pair in matched for module in pair}:
            stack.callback(module.register_forward_pre_hook(partial(_keep, seen), with_kwargs=True).remove)
        stack.enter_context(_evaluating(model))
        model(ids_BT.to(embedding.weight.device))
    for block, plugin in matched:
        stream, rms = _median_length(seen[block]), _median_length(seen[plugin]) / seen[plugin].shape[-1] ** 0.5
        if 0 < stream < math.inf and 0 < rms < math.inf:
            scales = {"input_rms": _power_of_two(rms), "stream_length": _power_of_two(stream)}
            called(f"{type(plugin).__name__}.match_stream", plugin.match_stream, **scales)


def _keep(seen: dict[nn.Module, Tensor], module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    seen[module] = inputs[0] if inputs else next(iter(named.values()))


def _median_length(x_BTD: Tensor) -> float:
    return x_BTD.float().norm(dim=-1).median().item()


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
