"""Adapters of low rank beside linear layers, as PEFT stores them: what their weights are called, and how they merge.

PEFT wraps each linear layer: `query.weight` becomes `query.base_layer.weight`, beside `query.lora_A.default.weight`
and `query.lora_B.default.weight`, and checkpoints have these names.

Letters: R rank of an adapter, X its inputs or outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from pkm_lightning.checkpoints import DerivedTensor, SavedCheckpoint

#: PEFT's name of the only adapter.
ADAPTER = "default"
_BASE = "base_layer."
_MODEL = "state_dict.model."
#: Matrices that transformers stores as (in, out), in models of these types; others have linear layers of such names.
_TRANSPOSED, _TRANSPOSED_TYPES = ("c_attn", "c_proj", "c_fc"), ("gpt2", "openai-gpt")


def base_name(name: str) -> str | None:
    """Returns the name that a weight has in a model without adapters; None for a weight of an adapter."""
    return None if ".lora_" in name else name.replace(f".{_BASE}", ".")


def merge_adapters(checkpoint: SavedCheckpoint) -> None:
    """Adds the adapters of a checkpoint to their matrices, W + alpha / R * B A: it then is that of a plain model.

    The sums are made in fp32 when they are read, and rounded to the dtype of the matrix. A checkpoint without adapters
    stays as it is.
    """
    weights = [name for name in checkpoint.shapes if name.startswith(_MODEL)]
    replaced = [name for name in weights if base_name(name) != name]
    if not replaced:
        return
    keys = checkpoint.config["finetune"]
    scale = float(keys["alpha"]) / int(keys["rank"])
    architecture = checkpoint.config["model"].get("architecture") or {}
    transposed = _TRANSPOSED if architecture.get("model_type") in _TRANSPOSED_TYPES else ()
    merged: dict[str, DerivedTensor] = {}
    for name in replaced:
        base = base_name(name)
        if base is None:
            continue
        shape, dtype = checkpoint.shapes[name]
        layer, part = name.split(f".{_BASE}")
        if part == "weight":
            names = (name, f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight")
            is_transposed = layer.rpartition(".")[2] in transposed
            values = functools.partial(_sum, checkpoint, names, scale, is_transposed)
        else:
            values = functools.partial(checkpoint.whole, name)
        merged[base] = DerivedTensor(shape, dtype, values)
    checkpoint.derive(merged, without=replaced, config={**checkpoint.config, "finetune": {}})


def _sum(checkpoint: SavedCheckpoint, names: Sequence[str], scale: float, is_transposed: bool) -> Tensor:
    base_XX, down_RX, up_XR = (checkpoint.whole(name) for name in names)
    change_XX = up_XR.float() @ down_RX.float() * scale
    return (base_XX.float() + (change_XX.T if is_transposed else change_XX)).to(base_XX.dtype)
