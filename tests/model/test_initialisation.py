"""Initialisation against its table, from a seed and each module's name alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import DIM, Constant, Reporter, config, dense, memory_ffns, token_ids, transformer

from pkm_lightning.build.model import build_model
from pkm_lightning.ffn import Dense, MemoryPlus
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer

N_LAYERS = 4
WIDE = {"vocab_size": 900, "dim": 96, "n_heads": 4, "n_kv_heads": 4}


def wide_model() -> Transformer:
    table = ValueTable(rows=25 * 25, dim=48)
    sizes = {"n_keys": 25, "heads": 4, "knn": 3, "key_dim": 64, "value_dim": 48, "qk_norm": True}
    ffns: list[nn.Module] = [Dense(dim=96, n_layers=N_LAYERS, hidden_dim=200) for _ in range(N_LAYERS - 1)]
    return transformer([*ffns, MemoryPlus(dim=96, table=table, **sizes)], [table], **WIDE)


def test_standard_deviations() -> None:
    model = wide_model()
    for name, std in {
        "embedding.weight": 96**-0.5,
        "unembedding.weight": 96**-0.5,
        "blocks.1.attention.query.weight": 96**-0.5,
        "blocks.1.attention.key.weight": 96**-0.5,
        "blocks.1.attention.value.weight": 96**-0.5,
        "blocks.1.attention.out.weight": (96 * 2 * N_LAYERS) ** -0.5,
        "blocks.0.ffn.gate.weight": 96**-0.5,
        "blocks.0.ffn.out.weight": (200 * 2 * N_LAYERS) ** -0.5,
        "blocks.3.ffn.gate.weight": 48**-0.5,
        "blocks.3.ffn.out.weight": 96**-0.5,
        "blocks.3.ffn.addressing.keys.keys": (64 * 3) ** -0.5,
        "blocks.3.ffn.addressing.query.projection.weight": (2 / (96 + 4 * 64)) ** 0.5,
        "tables.0.weight": 48**-0.5,
    }.items():
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx(std, rel=0.04), name
        assert weight.mean().item() == pytest.approx(0, abs=0.1 * std), name


def test_gains_are_one_and_biases_zero_whatever_they_were() -> None:
    model = wide_model()
    one_dimensional = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    with torch.no_grad():
        for parameter in one_dimensional.values():
            parameter.fill_(7)
    model.init_weights(0)
    for name, parameter in one_dimensional.items():
        assert bool((parameter == (0 if name.endswith("bias") else 1)).all()), name
    assert any(name.endswith("bias") for name in one_dimensional)
    assert sum(name.endswith("norm.weight") for name in one_dimensional) == 2 * N_LAYERS + 3


def test_two_ffns_of_one_seed_start_from_the_same_other_weights() -> None:
    models = {name: build_model(config(f"ffn={name}")) for name in ("dense", "memory_plus")}
    for model in models.values():
        model.init_weights(3)
    dense_state = models["dense"].state_dict()
    common = {name: p for name, p in models["memory_plus"].state_dict().items() if ".ffn." not in name}
    common.pop("tables.0.weight")
    assert {name for name in dense_state if ".ffn." not in name} == common.keys()
    for name, weight in common.items():
        assert torch.equal(dense_state[name], weight), name


def test_equal_modules_of_different_layers_differ() -> None:
    model = transformer([dense(2), dense(2)])
    first, second = model.blocks
    assert not torch.equal(first.attention.query.weight, second.attention.query.weight)
    assert not torch.equal(first.ffn.gate.weight, second.ffn.gate.weight)
    assert not torch.equal(first.ffn.gate.weight, first.ffn.up.weight)


def test_the_seed_decides() -> None:
    model = transformer(*memory_ffns())
    start = {name: p.clone() for name, p in model.state_dict().items()}
    model.init_weights(1)
    other = {name: p.clone() for name, p in model.state_dict().items()}
    random_ones = {name for name in start if not name.endswith(("norm.weight", "bias"))}
    assert {name for name in start if not torch.equal(start[name], other[name])} == random_ones
    model.init_weights(0)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, start[name]), name


def test_a_plugin_without_reset_parameters_keeps_its_own() -> None:
    constant, reporter = Constant(2.5), Reporter(dim=DIM)
    before = reporter.linear.weight.clone()
    transformer([constant, reporter])
    assert constant.value.item() == 2.5
    assert torch.equal(reporter.linear.weight, before)


def test_the_global_random_state_is_left_alone() -> None:
    model = transformer(*memory_ffns())
    state = torch.get_rng_state()
    model.init_weights(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_plugins_of_a_parallel_layer_are_drawn() -> None:
    model = build_model(config("placement.mode=parallel"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(token_ids(1, 4)).hidden_BTD.isfinite().all()
