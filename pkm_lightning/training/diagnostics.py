"""Signs of instability inside the model: norms, extremes of scores and logits, saturation.

A module provides them itself, by a method `diagnostics(output, *inputs)`, which an extra forward of a few sequences
calls: a training step pays nothing for it, and neither compiled nor recomputed blocks are affected.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pkm_lightning.memory import ValueTable
from pkm_lightning.ops.ranks import local_shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pkm_lightning.model import Transformer

#: Scalars by name, per layer and for the output (layer None).
LayerDiagnostics = dict[int | None, dict[str, Tensor]]


@torch.no_grad()
def probe(model: Transformer, batch: Mapping[str, Tensor], n_sequences: int = 1) -> LayerDiagnostics:
    """Returns the diagnostics on the first `n_sequences` of a batch, in evaluation mode. Collective: call on all ranks.

    A module that several layers share reports to each of them the most extreme value of all its calls. Those of the
    output are `output_logit_max`, the largest absolute logit, and `log_partition`, the mean of logsumexp.

    Letters: W vocabulary.
    """
    figures: LayerDiagnostics = {}
    hooks = [
        module.register_forward_hook(functools.partial(_collect, figures.setdefault(layer, {})), with_kwargs=True)
        for layer, block in enumerate(model.blocks)
        for module in block.modules()
        if callable(getattr(module, "diagnostics", None))
    ]
    first = {name: batch[name][:n_sequences] for name in ("input_ids", "doc_ids", "valid") if name in batch}
    devices = [model.embedding.weight.device] if model.embedding.weight.is_cuda else []
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # Hooks on parts of a compiled block do not run, and another batch size would compile it again.
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            output = model(first["input_ids"], doc_ids_BT=first.get("doc_ids"), valid_BT=first.get("valid"))
            logits_BTW = model.unembed(output.hidden_BTD).float()
    finally:
        for module, was_training in modes:
            module.training = was_training
        for hook in hooks:
            hook.remove()
    figures[None] = {
        "output_logit_max": logits_BTW.abs().amax(),
        "log_partition": logits_BTW.logsumexp(-1).mean(),
    }
    return {layer: values for layer, values in figures.items() if values}


def _collect(
    values: dict[str, Tensor], module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
) -> None:
    reported: dict[str, Tensor] = module.diagnostics(output, *inputs, **keywords)  # type: ignore[operator]
    for name, value in reported.items():
        values[name] = more_extreme(name, values[name], value.float()) if name in values else value.float()


def more_extreme(name: str, first: Tensor, second: Tensor) -> Tensor:
    """Returns the smaller of two values whose name ends in `_min`, else the larger."""
    return torch.minimum(first, second) if name.endswith("_min") else torch.maximum(first, second)


def local_part(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a parameter under any strategy, without gradient."""
    # DeepSpeed's ZeRO-3 leaves the parameter empty, and keeps the rank's part in `ds_tensor`.
    return local_shard(getattr(parameter, "ds_tensor", parameter).detach())


def local_weights(module: nn.Module) -> dict[str, Tensor]:
    """Returns this rank's part of each parameter and table by name, under any strategy, without gradients."""
    held = {name: local_part(parameter) for name, parameter in module.named_parameters()}
    for name, table in module.named_modules():
        # Under an engine the weight of a table is no registered parameter.
        if isinstance(table, ValueTable) and table.stored is None:
            held[f"{name}.weight"] = local_part(table.weight)
        elif isinstance(table, ValueTable):  # rows of a file, which nothing changes
            held.pop(f"{name}.weight", None)
    return held


def largest_values(tensors: list[Tensor]) -> Tensor:
    """Returns the largest absolute value of each tensor, not finite where an element is not; 0 for an empty tensor."""
    largest = torch._foreach_norm([t if t.numel() else t.new_zeros(1) for t in tensors], float("inf"))
    return torch.stack([value.to(largest[0].device).float() for value in largest])
