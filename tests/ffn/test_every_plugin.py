"""The contract of `plugin_contract.py` for each YAML of `configs/ffn`, and for options that change a plugin's kind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from ffn.plugin_contract import Case, PluginContract, built, check_compiled, ids, run
from ffn.recorded_reads import check_reads, recorded_reads
from torch import Tensor
from tree import ffns_without_files

from pkm_lightning.build.model import build_model
from pkm_lightning.ffn import MemoryPlus, TableRead
from pkm_lightning.model.loss import token_nll

#: Sizes that the small model needs in place of the YAML's.
CHANGES: dict[str, dict[str, Any]] = {
    "engram": {"rows": 30, "row_dim": 3, "streams": 2},
    "moe": {"n_experts": 5, "top_k": 3, "sequence_balance_loss": 0.1},
    "moe_expert_choice": {"n_experts": 3},
    "ple": {"value_dim": 5},
    "ultramem": {"value_dim": 6, "spectrum_margin": 0},
    "ultramem_v2": {"value_dim": 5, "balance_loss": 0.1},
}
OPTIONS = [
    Case("moe", {"n_experts": 5, "top_k": 3, "balancing": "bias", "shared_experts": 2}, "balanced by bias"),
    Case("memory_plus", {"cures": {"simvq": True, "balance_loss": 0.1, "entropy_loss": 0.1}}, "losses"),
    Case("memory", {"cures": {"straight_through": True, "gumbel_noise": 0.1}}, "straight through"),
    Case("pkm", {"cures": {"gumbel_noise": 0.1, "entropy_loss": 0.1}}, "noise"),
    Case("memory_plus", {"gate": "sigmoid", "value_projection": True, "value_dim": 9}, "sigmoid gate"),
    Case("memory_plus", {"gate": "none", "temperature": True, "activation": "relu"}, "no gate"),
    Case("ultramem_v2", {"value_dim": 6, "cores": 2, "balance_loss": 0.1, "balance_counts": "preselected"}, "cores"),
    Case("peer", {"glu": True, "router": "sigmoid", "query_norm": "rms"}, "glu"),
    Case("peer", {"shared_keys": False}, "keys per head"),
    Case("engram", {"rows": 1, "row_dim": 5, "gate": "none", "orders": [4, 2], "kernel": 1}, "no gate"),
    Case("ple", {"context": False, "activation": "silu"}, "rows alone"),
]
NAMES = ffns_without_files()
CASES = [*(Case(name, CHANGES.get(name, {})) for name in NAMES), *OPTIONS]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryPlugin(PluginContract):
    pass


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_fp64_model_computes_in_fp64_throughout(case: Case) -> None:
    """Compares a directional derivative of the loss with its difference quotient: fp32 anywhere would be noise."""
    model, labels_BT = copy.deepcopy(built(case)).double().eval(), ids().roll(-1, 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in parameters]

    def loss() -> Tensor:
        return token_nll(model, run(model, ids()).hidden_BTD, labels_BT).mean()

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
            values.append(loss())
            torch._foreach_add_(parameters, directions, alpha=-step)
    assert float((values[0] - values[1]) / 2e-6) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.slow
def test_a_product_key_plugin_compiles() -> None:
    """Runs the slow test of all plugins for one."""
    check_compiled(Case("memory_plus"), lengths=(9, 8, 7))


@pytest.mark.parametrize("wrong", [{"ids": 14}, {"reads": 2}, {"groups": 1}, {"dot": True}, None], ids=str)
def test_wrong_reads_fail_the_contract(wrong: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(Case("memory_plus").settings())
    with recorded_reads(18) as calls:
        run(model, ids())
    check_reads(model, calls)
    reads = MemoryPlus.reads

    def wrong_reads(plugin: MemoryPlus) -> list[TableRead]:
        return [dataclasses.replace(read, **wrong) for read in reads(plugin)] if wrong else []

    monkeypatch.setattr(MemoryPlus, "reads", wrong_reads)
    with pytest.raises(AssertionError, match="differs from the table calls"):
        check_reads(model, calls)
