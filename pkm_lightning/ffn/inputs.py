"""What the forward of a plugin accepts, and sentences for what it does not: in a loop of the user's own, a layer is
called with tensors that no builder has checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext
from pkm_lightning.memory import own_parameters

if TYPE_CHECKING:
    from torch import Tensor


def check_input(plugin: nn.Module, x_BTD: Tensor, dim: int, context: FFNContext) -> None:
    """Refuses hidden states of another shape than (B, T, D) or (T, D).

    In a call without a context it also refuses another device or dtype than that of the plugin's parameters: within a
    model, casts are the business of autocast and of the engine.

    Raises:
        ConfigError: naming the shape, device or dtype, and what to do.
    """
    if x_BTD.ndim not in (2, 3) or x_BTD.shape[-1] != dim:
        shape = tuple(x_BTD.shape)
        advice = f"build the layer with dim={shape[-1]}" if x_BTD.ndim in (2, 3) else "flatten it to tokens"
        if x_BTD.ndim == 4:
            advice = "for features (B, C, H, W) pass x.flatten(2).transpose(1, 2)"
        raise ConfigError(
            f"{type(plugin).__name__} takes x of shape (B, T, {dim}) or (T, {dim}), not {shape}; {advice}."
        )
    if context is NO_CONTEXT:
        _check_kind(plugin, x_BTD)


def check_tokens(plugin: nn.Module, x_BTD: Tensor, dim: int, context: FFNContext) -> None:
    """Refuses a call without the token ids of `x_BTD`, by which a plugin that is addressed by tokens finds its rows.

    Raises:
        ConfigError: no ids, or ids of another shape; as `check_input`.
    """
    name = type(plugin).__name__
    if context is NO_CONTEXT:
        raise ConfigError(
            f"{name} reads rows by token id, so its forward needs them: call it as "
            "layer(x, FFNContext(input_ids)), with input_ids of shape (B, T)."
        )
    check_input(plugin, x_BTD, dim, context)
    if context.input_ids_BT.shape != x_BTD.shape[:-1] or x_BTD.ndim != 3:
        raise ConfigError(
            f"{name} needs a token id for each of x, (B, T) for (B, T, {dim}): got ids of shape "
            f"{tuple(context.input_ids_BT.shape)} and x of shape {tuple(x_BTD.shape)}."
        )


def _check_kind(plugin: nn.Module, x_BTD: Tensor) -> None:
    # A table may stay in host memory or in another dtype; reads are cast to those of x.
    weight = next((p for p in own_parameters(plugin) if p.is_floating_point()), None)
    if weight is None:
        return
    # torch raises for a device that has no autocast, such as meta.
    kind = x_BTD.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if x_BTD.device != weight.device or (x_BTD.dtype != weight.dtype and not casts):
        raise ConfigError(
            f"x is {_kind(x_BTD)}, but the weights of {type(plugin).__name__} are {_kind(weight)}; move one of them, "
            f"as in layer.to({str(x_BTD.device)!r}, {x_BTD.dtype}), or call the layer under torch.autocast."
        )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"
