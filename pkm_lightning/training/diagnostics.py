"""Signs of instability inside the model: norms, extremes of scores and logits, saturation.

A module provides them itself, by a method `diagnostics(output, *inputs)` which a forward pass of a few rows calls apart
from training: steps pay nothing for it, and neither compiled blocks nor recomputed ones know of it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.memory import ValueTable
from pkm_lightning.training.clipping import local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pkm_lightning.model import Transformer

#: Of each layer and of the output (layer None): scalars by name.
Diagnostics = dict[int | None, dict[str, Tensor]]


@torch.no_grad()
def probe(model: Transformer, batch: Mapping[str, Tensor], rows: int = 1) -> Diagnostics:
    """The diagnostics of every layer on the first `rows` of a batch, in evaluation mode; all ranks must ask.

    A module that several layers share tells each of them the most extreme of all its calls.

    Of the output: `output_logit_max`, the largest absolute logit, and `log_partition`, the mean of logsumexp.
    """
    found: Diagnostics = {}
    hooks = [
        module.register_forward_hook(functools.partial(_note, found.setdefault(layer, {})), with_kwargs=True)
        for layer, block in enumerate(model.blocks)
        for module in block.modules()
        if callable(getattr(module, "diagnostics", None))
    ]
    few = {name: batch[name][:rows] for name in ("input_ids", "doc_ids", "valid") if name in batch}
    devices = [model.embedding.weight.device] if model.embedding.weight.is_cuda else []
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            output = model(few["input_ids"], doc_ids_BT=few.get("doc_ids"), valid_BT=few.get("valid"))
            logits_BTW = model.unembed(output.hidden_BTD).float()
    finally:
        for module, was_training in modes:
            module.training = was_training
        for hook in hooks:
            hook.remove()
    found[None] = {
        "output_logit_max": logits_BTW.abs().amax(),
        "log_partition": logits_BTW.logsumexp(-1).mean(),
    }
    return {layer: values for layer, values in found.items() if values}


def _note(
    into: dict[str, Tensor], module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
) -> None:
    found: dict[str, Tensor] = module.diagnostics(output, *inputs, **named)  # type: ignore[operator]
    for name, value in found.items():
        into[name] = worse(name, into[name], value.float()) if name in into else value.float()


def worse(name: str, one: Tensor, other: Tensor) -> Tensor:
    """The more extreme of two values of one name: the smaller of minima, else the larger."""
    return torch.minimum(one, other) if name.endswith("_min") else torch.maximum(one, other)


def held_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, under any strategy; without gradient."""
    # ZeRO-3 keeps its piece beside an empty parameter.
    return local(getattr(parameter, "ds_tensor", parameter).detach())


def held_weights(module: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of each parameter and table, under any strategy, by name; without gradients."""
    held = {name: held_part(parameter) for name, parameter in module.named_parameters()}
    for name, table in module.named_modules():
        if isinstance(table, ValueTable):
            held[f"{name}.weight"] = held_part(table.weight)
    return held


def largest_values(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, not finite where one is not; of an empty tensor 0."""
    found = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], float("inf"))
    return torch.stack([value.to(found[0].device).float() for value in found])
