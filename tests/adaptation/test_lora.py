"""LoRA: the formula, what it adapts and freezes, and a start that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from toys import config, token_ids
from tree import ffns_without_files

from pkm_lightning.adaptation import LoRA
from pkm_lightning.build.adapters import base_name
from pkm_lightning.build.model import build_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.model import Transformer

SMALL = ("model.n_layers=2", "model.dim=16", "model.ffn_dim=20", "model.n_heads=4", "model.memory.n_keys=16")
KEYS: dict[str, Any] = {
    "rank": 3, "alpha": 12, "dropout": 0.0, "targets": None, "seed": 1, "replay_share": 0.0, "replay_path": None,
}  # fmt: skip
ATTENTION = {f"attention.{name}" for name in ("query", "key", "value", "out")}
DENSE = {f"ffn.{name}" for name in ("gate", "up", "out")}


def built(*overrides: str, **keys: Any) -> tuple[Transformer, Transformer]:
    """Returns a model with adapters, and the same one without."""
    settings = config(*SMALL, *overrides)
    plain, adapted = build_model(settings), build_model(settings)
    LoRA(**{**KEYS, **keys}).adapt(adapted)
    for model in (plain, adapted):
        model.init_weights(3)
        model.eval()
    return adapted, plain


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def logits(model: Transformer, ids_BT: Tensor) -> Tensor:
    return model.unembed(model(ids_BT).hidden_BTD)


def test_a_model_starts_as_it_was_and_nothing_else_learns() -> None:
    adapted, plain = built("table.learning=rows")
    ids_BT = token_ids()
    assert torch.equal(logits(adapted, ids_BT), logits(plain, ids_BT))
    assert all(p.requires_grad == (base_name(name) is None) for name, p in adapted.named_parameters())
    assert all(table.stage is None for table in adapted.value_tables)
    before = {base_name(name): value.clone() for name, value in adapted.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(adapted, ids_BT).flatten(0, 1), ids_BT.flatten()).backward()
        optimizer.step()
    assert not torch.equal(logits(adapted.eval(), ids_BT), logits(plain, ids_BT))
    after = {base_name(name): value for name, value in adapted.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name is not None)
    assert before.keys() - {None} == plain.state_dict().keys()


def test_an_adapted_layer_computes_the_formula() -> None:
    adapted, plain = built()
    layer: Any = adapted.blocks[1].attention.query
    base_XX = plain.blocks[1].attention.query.weight
    down_RX, up_XR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down_RX.shape == (3, 16)
    assert not up_XR.any()
    nn.init.normal_(up_XR)
    x_TX = torch.randn(5, 16)
    assert_close(layer(x_TX), x_TX @ base_XX.T + 12 / 3 * (x_TX @ down_RX.T) @ up_XR.T)


def test_adapters_are_drawn_from_the_seed_and_their_names() -> None:
    first, again, other = (built(seed=seed)[0].state_dict() for seed in (1, 1, 2))
    drawn = [name for name in first if ".lora_A." in name]
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in drawn)
    assert len({first[name].flatten()[0].item() for name in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("overrides", "targets", "expected"),
    [
        (["ffn=dense"], None, {(layer, part) for layer in (0, 1) for part in ATTENTION | DENSE}),
        (["placement.layers=[1]"], None, {(0, part) for part in ATTENTION | DENSE} | {(1, part) for part in ATTENTION}),
        (["ffn=dense"], ["query", "ffn.up"], {(n, part) for n in (0, 1) for part in ("attention.query", "ffn.up")}),
        (["ffn=dense"], ["blocks.1.attention.*"], {(1, part) for part in ATTENTION}),
        ([], ["ffn.gate", "query.projection"], {(n, f"ffn.{p}") for n in (0, 1) for p in
                                                ("gate", "addressing.query.projection")}),
        (["ffn=dense"], ["?ey"], {(0, "attention.key"), (1, "attention.key")}),
    ],
)  # fmt: skip
def test_targets(overrides: list[str], targets: list[str] | None, expected: set[tuple[int, str]]) -> None:
    adapted, _ = built(*overrides, targets=targets)
    assert adapted_layers(adapted) == {f"blocks.{layer}.{part}" for layer, part in expected}


@pytest.mark.parametrize("ffn", ffns_without_files())
def test_no_plugin_goes_around_its_linear_layers(ffn: str) -> None:
    """An adapter beside a matrix that is read as a tensor, and not called, would learn nothing."""
    model = build_model(config(*SMALL, f"ffn={ffn}"))
    linear = [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    LoRA(**{**KEYS, "targets": linear}).adapt(model)
    model.init_weights(3)
    logits(model, token_ids()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "finetune.rank=0"),
        ({"alpha": 0}, "finetune.alpha=0"),
        ({"targets": ["attention.qury"]}, r"'attention.qury' matches no linear layer.*Did you mean 'attention.query'"),
        ({"targets": ["embedding"]}, "'embedding' matches no linear layer in the blocks"),
        ({"targets": ["unembedding"]}, "'unembedding' matches no linear layer in the blocks"),
        ({"targets": ["ffn_norm"]}, "'ffn_norm' matches no linear layer"),
        ({"targets": []}, "no linear layer"),
    ],
)
def test_refusals(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(**{**KEYS, **keys}).adapt(build_model(config(*SMALL)))
