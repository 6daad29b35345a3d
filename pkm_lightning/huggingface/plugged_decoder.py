"""What plugins in a decoder of transformers see of each forward: tokens, padding, and earlier tokens in the cache.

Two hooks on the decoder do it, so that its class, and what transformers knows of it, stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from pkm_lightning.build.hosts import LAYERS_OF
from pkm_lightning.ffn import NO_CONTEXT, FFNContext, HasRowIds, replaced
from pkm_lightning.huggingface.foreign_cache import ForeignCache
from pkm_lightning.model.plugged_layer import PluggedLayer, decoder_call

#: Of the decoder, while a forward is under way.
_CALL = "_plugged_call"


def follow(decoder: nn.Module) -> None:
    """Makes every forward of `decoder` give its plugins the context of its tokens."""
    if _enter not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_enter, with_kwargs=True)
        decoder.register_forward_hook(_leave, always_call=True)


def _enter(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    blocks = getattr(decoder, LAYERS_OF[getattr(decoder.config, "trunk_type", decoder.config.model_type)])
    layers = [block for block in blocks if isinstance(block, PluggedLayer)]
    if not layers or layers[0].call is not None:  # a trunk around the model gives the context itself
        return None
    named = _by_name(decoder, args, kwargs)
    plugins = [plugin for layer in layers for _, plugin in layer.named_plugins()]
    cache = _cache(decoder, named, plugins)
    view, valid_BT = _view(named, cache, len(blocks), needed=cache is not None and _remember(plugins))
    stack = ExitStack()
    context = _context(named, plugins, valid_BT)
    call = stack.enter_context(decoder_call(layers, context, None if view is None else view.layers))

    def take_embedding(embedding: nn.Module, args: object, embedding_BTD: Tensor) -> None:
        call.context = replaced(call.context, embedding_BTD=embedding_BTD)

    # Not computed here: engines gather the matrix around the decoder's own forward.
    stack.callback(decoder.get_input_embeddings().register_forward_hook(take_embedding).remove)
    setattr(decoder, _CALL, stack)
    return (), named


def _leave(decoder: nn.Module, args: object, output: object) -> None:
    stack: ExitStack | None = getattr(decoder, _CALL, None)
    if stack is not None:
        setattr(decoder, _CALL, None)
        stack.close()


def _by_name(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the decoder's forward by name."""
    named = dict(inspect.signature(type(decoder).forward).bind(decoder, *args, **kwargs).arguments)
    del named["self"]
    named |= named.pop("kwargs", {})
    if "past_key_values" in named:  # the name before transformers 5.24
        named["cache"] = named.pop("past_key_values")
    return named


def _context(named: dict[str, Any], plugins: Sequence[nn.Module], valid_BT: Tensor | None) -> FFNContext:
    input_ids_BT: Tensor | None = named.get("input_ids")
    if input_ids_BT is not None:
        return FFNContext(input_ids_BT, valid_BT)
    by_token = next((plugin for plugin in plugins if isinstance(plugin, HasRowIds)), None)
    if by_token is not None:
        raise ValueError(
            f"inputs_embeds: {type(by_token).__name__} reads rows by token id; pass input_ids in their place."
        )
    return replaced(NO_CONTEXT, valid_BT=valid_BT)


def _remember(plugins: Sequence[nn.Module]) -> bool:
    return any(getattr(plugin, "uses_past", False) for plugin in plugins)


def _cache(decoder: Any, named: dict[str, Any], plugins: Sequence[nn.Module]) -> Cache | None:
    """Returns the cache of the forward, which is a new one where plugins have to remember something in it.

    Raises:
        ValueError: the cache cannot hold what a plugin needs of earlier tokens.
    """
    cache: Cache | None = named.get("cache")
    wanted = decoder.config.use_cache if named.get("use_cache") is None else named["use_cache"]
    if cache is None and wanted and not decoder.training and _remember(plugins):
        cache = named["cache"] = DynamicCache(config=decoder.config)
    if cache is None:
        return None
    for plugin in plugins:
        uses_past, name = getattr(plugin, "uses_past", False), type(plugin).__name__
        if not uses_past and not getattr(plugin, "position_wise", False):
            raise ValueError(f"cache: {name} is neither position_wise nor uses_past; pass use_cache=False.")
        if uses_past and (not isinstance(cache, DynamicCache) or cache.offloading):
            raise ValueError(
                f"cache: a {type(cache).__name__}{' with offloading' if getattr(cache, 'offloading', False) else ''} "
                f"has no place for what {name} remembers of earlier tokens; leave cache_implementation out, or pass "
                "use_cache=False."
            )
    return cache


def _view(
    named: dict[str, Any], cache: Cache | None, n_layers: int, *, needed: bool
) -> tuple[ForeignCache | None, Tensor | None]:
    """Returns the view on the cache for plugins that remember, if `needed`, and which new tokens are real, (B, T).

    None for the latter where all are.
    """
    tokens: Tensor = named["inputs_embeds"][..., 0] if named.get("input_ids") is None else named["input_ids"]
    B, T = tokens.shape
    mask: Any = named.get("attention_mask")
    is_plain = isinstance(mask, Tensor) and mask.ndim == 2
    valid_BT = mask[:, -T:].bool() if is_plain else None
    if valid_BT is not None and bool(valid_BT.all()):
        valid_BT = None
    if not needed or cache is None:
        return None, valid_BT
    total = int(cache.get_seq_length()) + T
    valid_BP = mask.bool() if is_plain else torch.ones(B, total, dtype=torch.bool, device=tokens.device)
    if valid_BP.shape != (B, total):
        raise ValueError(
            f"attention_mask has the shape {tuple(valid_BP.shape)}; it must cover the {total - T} cached tokens and "
            f"the {T} new ones: ({B}, {total})."
        )
    return ForeignCache(cache, valid_BP, n_layers), valid_BT
