"""`zero_output` of every plugin: the output is zero, and two steps of training reach everything that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tree import ffns_without_files

import pkm_lightning
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, HasZeroOutput
from pkm_lightning.memory import TableOptimizer, ValueTable, row_learning_tables

KEYS = {"n_keys": 6, "heads": 3, "knn": 5, "key_dim": 10}
NGRAMS = {"rows": 30, "row_dim": 3, "vocab_size": 50}
EXPERTS = {"n_experts": 4, "dense_hidden_dim": 23}
TOKENS = {"vocab_size": 50}
TUCKER = {**KEYS, "value_dim": 6, "spectrum_margin": 0}
ROWS, VALUES = "reference.table.weight", "values.reference.table.weight"
#: The name of the YAML or of a variant of it, class, options, and the names of what starts at zero.
LEARNING: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("dense", "Dense", {"hidden_dim": 23}, {"out.weight"}),
    ("engram", "Engram", NGRAMS, {ROWS}),
    ("engram without gate", "Engram", {**NGRAMS, "gate": "none"}, {ROWS}),
    ("memory", "Memory", KEYS, {VALUES}),
    ("memory, SimVQ", "Memory", {**KEYS, "cures": {"simvq": True}}, {"values.projection.weight"}),
    ("memory_plus", "MemoryPlus", KEYS, {VALUES}),
    ("memory_plus, options", "MemoryPlus", {**KEYS, "gate": "sigmoid", "value_projection": True}, {VALUES}),
    ("moe", "MoE", {**EXPERTS, "top_k": 2}, {"experts.out"}),
    ("moe, shared", "MoE", {**EXPERTS, "top_k": 2, "shared_experts": 1}, {"experts.out", "shared.out.weight"}),
    ("moe_expert_choice", "ExpertChoiceMoE", EXPERTS, {"experts.out"}),
    ("peer", "PEER", KEYS, {"references.1.table.weight"}),
    ("peer, gated", "PEER", {**KEYS, "glu": True}, {"references.2.table.weight"}),
    ("pkm", "PKM", KEYS, {VALUES}),
    ("ple", "PLE", {**TOKENS, "value_dim": 5}, {"norm.weight"}),
    ("ple without context", "PLE", {**TOKENS, "context": False}, {"norm.weight"}),
    ("stem", "STEM", {**TOKENS, "hidden_dim": 23}, {ROWS}),
    ("ultramem", "UltraMem", TUCKER, {ROWS}),
    ("ultramem_v2", "UltraMemV2", {**KEYS, "value_dim": 5}, {"values.table.weight"}),
]
#: The same with rows that do not learn.
FROZEN: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("engram, frozen rows", "Engram", NGRAMS, {"value.weight"}),
    ("memory_plus, frozen rows", "MemoryPlus", KEYS, {"out.weight"}),
    ("stem, frozen rows", "STEM", {**TOKENS, "hidden_dim": 23}, {"out.weight"}),
    ("ultramem, frozen rows", "UltraMem", TUCKER, {"out.weight"}),
    ("ultramem_v2, frozen rows", "UltraMemV2", {**KEYS, "value_dim": 5}, {"out.weight"}),
]


def new_plugin(name: str, options: dict[str, Any], **keywords: Any) -> nn.Module:
    plugin: nn.Module = getattr(pkm_lightning, name)(dim=14, **options, **keywords)
    assert isinstance(plugin, HasZeroOutput)
    return plugin.train()


def freeze(plugin: nn.Module) -> None:
    for table in tables_of(plugin):
        table.requires_grad_(False)


def tables_of(plugin: nn.Module) -> list[ValueTable]:
    return [module for module in plugin.modules() if isinstance(module, ValueTable)]


def zero(plugin: nn.Module) -> set[str]:
    """Calls `zero_output` and returns the names of what it has changed, all of it to zero."""
    before = {name: value.clone() for name, value in plugin.state_dict().items()}
    assert isinstance(plugin, HasZeroOutput)
    plugin.zero_output()
    changed = {name for name, value in plugin.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(plugin.state_dict()[name].any() for name in changed)
    return changed


def output(plugin: nn.Module) -> Tensor:
    ids_BT = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(5))
    y_BTD: Tensor = plugin(3 * torch.randn(4, 9, 14), FFNContext(ids_BT, embedding_BTD=torch.randn(4, 9, 14))).y_BTD
    return y_BTD


def backward(plugin: nn.Module) -> Tensor:
    y_BTD = output(plugin)
    (y_BTD * torch.randn_like(y_BTD)).sum().backward()
    return y_BTD


def without_gradient(parameters: dict[str, nn.Parameter]) -> list[str]:
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters.values())
    return [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]


def test_no_plugin_is_left_out() -> None:
    assert set(ffns_without_files()) <= {case[0] for case in LEARNING}


def _name_of(value: object) -> str:
    return str(value[0] if isinstance(value, tuple) else value)  # sets have another order in each process


@pytest.mark.parametrize(
    ("case", "frozen"), [*((c, False) for c in LEARNING), *((c, True) for c in FROZEN)], ids=_name_of
)
def test_the_output_starts_at_zero_and_learns(case: tuple[str, str, dict[str, Any], set[str]], frozen: bool) -> None:
    _, name, options, expected = case
    plugin = new_plugin(name, options)
    if frozen:
        freeze(plugin)
    assert zero(plugin) == expected
    assert not output(plugin.eval()).any()
    assert not backward(plugin.train()).any()
    learning = {field: p for field, p in plugin.named_parameters() if p.requires_grad}
    assert without_gradient({field: learning[field] for field in expected}) == []
    sgd = torch.optim.SGD(learning.values(), lr=0.1)
    # Engram's convolution starts at zero in any case, so that the norm in front of it learns a step later.
    for late in (["conv_norm.weight"], []) if name == "Engram" else ([],):
        sgd.step()
        plugin.zero_grad()
        assert backward(plugin).any()
        assert without_gradient(learning) == late


@pytest.mark.parametrize(("name", "options"), [("MemoryPlus", KEYS), ("PEER", KEYS), ("Engram", NGRAMS)])
def test_rows_alone_learn_by_rows_from_zero(name: str, options: dict[str, Any]) -> None:
    sizes = [{"rows": t.rows, "dim": t.dim, "slices": t.slices} for t in tables_of(new_plugin(name, options))]
    tables = [ValueTable(**size, learning="rows") for size in sizes]
    plugin = new_plugin(name, options, table=tables[0] if len(tables) == 1 else tables)
    zero(plugin)
    plugin.requires_grad_(False)
    optimizer = TableOptimizer(None, row_learning_tables(plugin), lr=0.1)
    assert not backward(plugin).any()
    optimizer.step()
    assert output(plugin).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Memory", KEYS, "Memory cannot start with an output of zero, since its rows are frozen and no matrix"),
        ("PEER", KEYS, r"PEER cannot start .*; let rows that are drawn learn \(table.trainable=true\)"),
        ("Engram", {**NGRAMS, "norm_eps": 0}, r"ffn.norm_eps=0 normalises .* NaN"),
    ],
)
def test_what_could_not_learn_from_zero_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    plugin = new_plugin(name, options)
    freeze(plugin)
    with pytest.raises(ConfigError, match=message):
        zero(plugin)
