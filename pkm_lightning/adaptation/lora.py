"""`finetune=lora`: matrices of low rank beside linear layers learn, and nothing else does; PEFT puts them in.

`pkm_lightning.build.adapters` knows what their weights are called in checkpoints, and merges them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import nn

from pkm_lightning.adaptation.method import Finetuning, Share
from pkm_lightning.build.adapters import ADAPTER, base_name
from pkm_lightning.build.freezing import freeze_others
from pkm_lightning.build.kinds import Range
from pkm_lightning.errors import ConfigError, check_integer, check_range, missing_extra, nearest
from pkm_lightning.ffn import Dense
from pkm_lightning.model.initialisation import seed_torch

__all__ = ["LoRA"]


class LoRA(Finetuning):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685):

        y = W x + alpha / R * B A x

    A is drawn as PEFT draws it, from `seed` and its name; B starts at zero, so that the model starts as it was.

    | paper | here |
    |---|---|
    | r | `rank` |
    | A, B | `lora_A`, `lora_B` of PEFT's layers |

    Args:
        rank: R, 1 or more.
        alpha: above 0; the output of an adapter is multiplied by alpha / rank.
        dropout: share of an adapter's inputs that is zero in training.
        targets: linear layers in the model's blocks: names, ends of names (`attention.query`, `q_proj`) or patterns of
            these (`blocks.0.*`). None for those of attention and of dense FFNs.
        seed: of the first matrices.
        replay_share, replay_path: see `Finetuning`.

    Raises:
        ConfigError: a value out of range; in `adapt`, peft is not installed, or a target is no linear layer.
    """

    def __init__(
        self,
        *,
        rank: Annotated[int, Range(1)],
        alpha: float,
        dropout: Annotated[float, Range(0, 0.999)],
        targets: Sequence[str] | None,
        seed: int,
        replay_share: Share,
        replay_path: str | None,
    ) -> None:
        super().__init__(replay_share=replay_share, replay_path=replay_path)
        check_integer("finetune.rank", rank, low=1)
        check_range("finetune.alpha", alpha, low=1e-6)
        self.rank, self.alpha, self.dropout, self.targets, self.seed = rank, alpha, dropout, targets, seed

    def adapt(self, model: nn.Module) -> None:
        """Adds the adapters, and freezes all other parameters."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise missing_extra("finetune=lora", "peft", "lora") from None
        layers = _linear_layers(model)
        names = _projections(model, layers) if self.targets is None else _matching(self.targets, list(layers))
        if not names:
            raise ConfigError(
                "finetune=lora: the model has no linear layer in attention or a dense FFN; name others in "
                "finetune.targets=[NAME,...], or set finetune=full."
            )
        # GPT-2's matrices are (in, out); PEFT has one setting for all layers of a call.
        for is_transposed in (False, True):
            chosen = [name for name in names if isinstance(layers[name], nn.Linear) != is_transposed]
            if chosen:
                settings = LoraConfig(
                    r=self.rank,
                    lora_alpha=self.alpha,  # type: ignore[arg-type]
                    lora_dropout=self.dropout,
                    target_modules=chosen,
                    fan_in_fan_out=is_transposed,
                )
                inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
                del model.peft_config  # a record for PEFT's own class of models
        _draw(model, self.seed)
        freeze_others(model, {name for name, _ in model.named_parameters() if base_name(name) is None})

    def check(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        """Refuses a rank that no change of an adapted matrix has.

        Raises:
            ConfigError: saying the highest rank.
        """
        sides = [min(down.in_features, up.out_features) for down, up in _adapters(model)]
        if self.rank > max(sides):
            raise ConfigError(
                f"finetune.rank={self.rank} is higher than the rank of any adapted matrix, which is {max(sides)} at "
                f"most; allowed: 1 to {max(sides)}."
            )


def _adapters(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yields A and B of each adapted layer."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module.lora_A[ADAPTER], module.lora_B[ADAPTER]


def _linear_layers(model: Any) -> dict[str, nn.Module]:
    """Returns the linear layers of the blocks by name: `nn.Linear`, and `Conv1D` of transformers."""
    # The unembedding is none of them: merged, it would part from the embedding to which it is tied.
    blocks = {id(block) for block in model.blocks}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefixes) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def _projections(model: Any, layers: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of all layers but those of plugins other than dense FFNs."""
    others = {id(part) for _, _, p in model.plugins() if not isinstance(p, Dense) for part in p.modules()}
    return [name for name, layer in layers.items() if id(layer) not in others]


def _matching(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the names that a target matches.

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
    """Draws each adapter from the seed and its name: it depends on no other draw, and all ranks have the same."""
    from peft.tuners.lora import LoraLayer

    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    on_cpu = all(p.device.type in ("cpu", "meta") for p in model.parameters())
    with torch.random.fork_rng(devices=sorted(devices)):
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                seed_torch(f"{seed}/{name}", on_cpu=on_cpu)
                module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
