"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT: matrices of low rank beside linear layers, which alone learn.

    y = W x + alpha / R * B A x

PEFT wraps each linear layer: `query.weight` becomes `query.base_layer.weight`, beside `query.lora_A.default.weight`
and `query.lora_B.default.weight`, and checkpoints have these names. `base_name` gives the name of before.

Letters: R rank of an adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pkm_lightning.build.freezing import freeze_others
from pkm_lightning.checkpoints import DerivedTensor, SavedCheckpoint
from pkm_lightning.errors import ConfigError, check_integer, check_range, missing_extra, nearest
from pkm_lightning.ffn import Dense
from pkm_lightning.model import Transformer
from pkm_lightning.model.initialisation import seed_torch

Config = Mapping[str, Any]

#: What PEFT calls the wrapped layer, and its only adapter.
_BASE, _ADAPTER = ".base_layer.", "default"
_MODEL = "state_dict.model."
#: Matrices of GPT-2, which transformers stores as (in, out).
_TRANSPOSED = ("c_attn", "c_proj", "c_fc")


def has_adapters(config: Config) -> bool:
    """Returns whether the model of `config` has adapters."""
    return (config.get("finetune") or {}).get("method") == "lora"


def base_name(name: str) -> str | None:
    """Returns the name of a weight before adapters came in; None for a weight of an adapter."""
    return None if ".lora_" in name else name.replace(_BASE, ".")


def add_adapters(model: Transformer, config: Config) -> None:
    """Puts adapters beside the linear layers that `finetune.targets` names, and freezes everything else.

    Their first matrices are drawn from `seed` and their names, the second ones are zero: the model's outputs stay what
    they are.

    Raises:
        ConfigError: peft is not installed, a value out of range, or a target that is no linear layer of the model.
    """
    keys = config["finetune"]
    check_integer("finetune.rank", keys["rank"], low=1)
    check_range("finetune.alpha", keys["alpha"], low=1e-6)
    check_range("finetune.dropout", keys["dropout"], low=0, high=0.999)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise missing_extra("finetune=lora", "peft", "lora") from None
    layers = _linear_layers(model)
    names = _matching(keys["targets"], list(layers)) if keys["targets"] is not None else _projections(model, layers)
    if not names:
        raise ConfigError(
            "finetune=lora needs linear layers, and the model's blocks have none outside of plugins; name those of "
            "plugins in finetune.targets, or set finetune=full."
        )
    by_width: dict[bool, list[str]] = {}
    for name in names:
        by_width.setdefault(not isinstance(layers[name], nn.Linear), []).append(name)
    for transposed, of_kind in by_width.items():
        settings = LoraConfig(
            r=keys["rank"],
            lora_alpha=keys["alpha"],
            lora_dropout=keys["dropout"],
            target_modules=of_kind,
            fan_in_fan_out=transposed,
        )
        inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
        del model.peft_config  # a record for PEFT's own model class
    _draw(model, int(config.get("seed", 0)))
    freeze_others(model, {name for name, _ in model.named_parameters() if base_name(name) is None})


def adapter_bytes(model: nn.Module) -> int:
    """Returns the bytes of all adapters of a model."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if base_name(name) is None)


def merge_adapters(checkpoint: SavedCheckpoint) -> None:
    """Adds the adapters of a checkpoint to the matrices beside which they stand: it then is one of a plain model.

    The sums are made in fp32, when they are read, and rounded to the dtype of the matrix.
    """
    if not has_adapters(checkpoint.config):
        return
    keys = checkpoint.config["finetune"]
    scale = float(keys["alpha"]) / int(keys["rank"])
    weights = [name for name in checkpoint.shapes if name.startswith(_MODEL)]
    merged: dict[str, DerivedTensor] = {}
    for name in weights:
        base = base_name(name)
        if base is None or base == name:
            continue
        shape, dtype = checkpoint.shapes[name]
        prefix = name[: -len("base_layer.weight")]
        adapter = f"{prefix}lora_A.{_ADAPTER}.weight", f"{prefix}lora_B.{_ADAPTER}.weight"
        if not name.endswith("base_layer.weight") or adapter[0] not in checkpoint.shapes:
            values = functools.partial(checkpoint.whole, name)  # a bias
        else:
            is_transposed = prefix.rstrip(".").rpartition(".")[2] in _TRANSPOSED
            values = functools.partial(_sum, checkpoint, (name, *adapter), scale, is_transposed)
        merged[base] = DerivedTensor(shape, dtype, values)
    replaced = [name for name in weights if base_name(name) != name]
    config = {**checkpoint.config, "finetune": {"method": None}}
    checkpoint.derive(merged, without=replaced, config=config)


def _sum(checkpoint: SavedCheckpoint, names: Sequence[str], scale: float, transposed: bool) -> Tensor:
    base, down_RX, up_XR = (checkpoint.whole(name) for name in names)
    delta = up_XR.float() @ down_RX.float() * scale
    return (base.float() + (delta.T if transposed else delta)).to(base.dtype)


def _linear_layers(model: Transformer) -> dict[str, nn.Module]:
    """Returns the linear layers of the blocks by name: of `nn.Linear`, or GPT-2's, whose weight is (in, out)."""
    # The unembedding is none of them: where it is tied, its merged matrix would be another one than the embedding's.
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if any(name.startswith(prefix) for prefix in _block_prefixes(model))
    }


def _block_prefixes(model: Transformer) -> Iterator[str]:
    blocks = {id(block) for block in model.blocks}
    return (f"{name}." for name, module in model.named_modules() if id(module) in blocks)


def _projections(model: Transformer, layers: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of the layers of attention and dense FFNs: all but those of other plugins."""
    plugins = {id(part) for _, _, p in model.plugins() if not isinstance(p, Dense) for part in p.modules()}
    return [name for name, layer in layers.items() if id(layer) not in plugins]


def _matching(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the names that a target matches: a whole name, the end of one, or a pattern of either.

    Raises:
        ConfigError: a target matches none.
    """
    chosen: set[str] = set()
    for target in targets:
        matches = {name for name in names if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")}
        if not matches:
            ends = sorted({".".join(name.split(".")[-2:]) for name in names})
            parts = [part for end in ends for part in (end, end.rpartition(".")[2])]
            raise ConfigError(
                f"finetune.targets: {target!r} matches no linear layer in the blocks of the model, whose names end in "
                f"{', '.join(ends)}.{nearest(target, parts)}"
            )
        chosen |= matches
    return [name for name in names if name in chosen]


def _draw(model: nn.Module, seed: int) -> None:
    """Draws the adapters anew, each from the seed and its name, so that they depend on no other draw."""
    from peft.tuners.lora import LoraLayer

    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    on_cpu = all(p.device.type in ("cpu", "meta") for p in model.parameters())
    with torch.random.fork_rng(devices=sorted(devices)):
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                seed_torch(f"{seed}/{name}", on_cpu=on_cpu)
                module.reset_lora_parameters(_ADAPTER, init_lora_weights=True)
