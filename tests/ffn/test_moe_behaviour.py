"""Both mixtures of experts as modules: precision, causality, copies, casts, compilation, checkpointing, bias updates.

Letters: B sequences, T tokens, D model dimension, E experts.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from ffn import moe_reference
from ffn.test_moe import SETTINGS, build, context
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import config
from training.fits import fit, rows, settings, split

import pkm_lightning.ffn.moe
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.sizing import solve_size
from pkm_lightning.ffn import ExpertChoiceMoE, FFNContext, MoE

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "renormalise": True, "shared_experts": 1, "balancing": "bias", "routed_scale": 2.5},
    {"select": "after", "balancing": "none"},
]


def token_choice(**changes: Any) -> MoE:
    return build(**changes)[0].float()


def expert_choice() -> ExpertChoiceMoE:
    layer = {"dim": 7, "n_experts": 5, "capacity_factor": 1.5, "eval_top_k": 2, "hidden_dim": 3}
    return ExpertChoiceMoE(**layer, n_layers=2, dense_hidden_dim=1)


LAYERS = pytest.mark.parametrize("make", [token_choice, lambda: token_choice(**OPTIONS[1]), expert_choice])


def reference(layer: nn.Module, options: dict[str, Any], x_BTD: Tensor) -> Tensor:
    exact = copy.deepcopy(layer).double()
    return moe_reference.token_choice(exact, {**SETTINGS, **options}, x_BTD.double())[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_models_and_autocast_are_close_to_float64(options: dict[str, Any]) -> None:
    """The router's scores are fp32 in both, so that the reference chooses the same experts."""
    layer, x_BTD = token_choice(**options), torch.randn(2, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["expert_weights"].dtype is torch.float32
    assert {loss.dtype for loss in output.aux_losses.values()} == {torch.float32}
    assert_close(output.y_BTD, reference(layer, options, x_BTD))
    layer, x_BTD = layer.bfloat16(), x_BTD.bfloat16()
    output = layer(x_BTD, context(x_BTD, observe=True))
    assert output.y_BTD.dtype is torch.bfloat16
    assert output.trace["expert_weights"].dtype is torch.float32
    assert_close(output.y_BTD, reference(layer, options, x_BTD))


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_in_bf16_is_close_to_float64(training: bool) -> None:
    layer, x_BTD = expert_choice().train(training), torch.randn(2, 9, 7)
    every_T = torch.ones(18, dtype=torch.bool)
    for autocast in (True, False):
        if not autocast:
            layer, x_BTD = layer.bfloat16(), x_BTD.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BTD = layer(x_BTD, context(x_BTD)).y_BTD
        exact, x_TD = copy.deepcopy(layer).double(), x_BTD.flatten(0, 1).double()
        if training:
            expected_TD = moe_reference.expert_choice(exact, 1.5, x_TD, every_T)[0]
        else:
            expected_TD = moe_reference.token_choice_of_expert_choice(exact, 2, x_TD)
        assert y_BTD.dtype is torch.bfloat16
        assert_close(y_BTD.flatten(0, 1), expected_TD)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_token_choice_is_causal(options: dict[str, Any], training: bool) -> None:
    layer = build(**options)[0].train(training)
    x_BTD = torch.randn(2, 8, 7, dtype=torch.float64)
    for t in range(8):
        changed_BTD = x_BTD.clone()
        changed_BTD[:, t] = 10 * torch.randn(2, 7)
        before_BTD, after_BTD = (layer(x, context(x)).y_BTD for x in (x_BTD, changed_BTD))
        assert_close(after_BTD[:, :t], before_BTD[:, :t])
        assert_close(after_BTD[:, t + 1 :], before_BTD[:, t + 1 :])


def test_evaluation_reports_nothing_and_the_trace_comes_when_asked() -> None:
    layer, x_BTD = token_choice(**OPTIONS[1]).eval(), torch.randn(2, 5, 7)
    output = layer(x_BTD, context(x_BTD))
    assert (output.aux_losses, output.step_stats, output.metrics, output.trace) == ({}, {}, {}, {})
    trace = layer(x_BTD, context(x_BTD, observe=True)).trace
    assert trace["expert_ids"].dtype is torch.int32
    assert trace["expert_ids"].shape == trace["expert_weights"].shape == (2, 5, 2)
    assert not trace["expert_weights"].requires_grad
    assert_close(trace["expert_weights"].sum(-1), torch.full((2, 5), 2.5))


@LAYERS
def test_copies_pickles_and_state_dicts_are_whole(make: Any) -> None:
    layer, x_BTD = make(), torch.randn(2, 5, 7)
    fresh = copy.deepcopy(layer)
    fresh.reset_parameters()
    assert not torch.equal(fresh(x_BTD, context(x_BTD)).y_BTD, layer(x_BTD, context(x_BTD)).y_BTD)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x_BTD, context(x_BTD)).y_BTD, layer(x_BTD, context(x_BTD)).y_BTD)


@LAYERS
def test_a_layer_built_on_meta_runs_there_and_is_complete_after_materialisation(make: Any) -> None:
    layer = make()
    torch.manual_seed(1)
    layer.reset_parameters()
    moved = copy.deepcopy(layer).to("meta")
    x_BTD = torch.empty(2, 5, 7, device="meta")
    on_meta = FFNContext(torch.empty(2, 5, device="meta"), torch.empty(2, 5, dtype=torch.bool, device="meta"))
    for training in (True, False):
        assert moved.train(training)(x_BTD, on_meta).y_BTD.shape == (2, 5, 7)
    moved.to_empty(device="cpu")
    torch.manual_seed(1)
    moved.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(moved.state_dict()[name], value), name


def test_a_cast_to_bf16_leaves_the_bias_exact() -> None:
    layer = token_choice(balancing="bias")
    layer.bias_steps.copy_(torch.tensor([1001, -999, 0, 257, 100_001]))  # bf16 has 8 bits of precision
    cast = copy.deepcopy(layer).bfloat16().float()
    assert cast.bias_steps.dtype is torch.int64
    assert torch.equal(cast.bias_steps, layer.bias_steps)
    assert "bias_steps" not in token_choice(balancing="loss").state_dict()


def test_the_bias_follows_the_loads_of_a_step() -> None:
    layer = token_choice(balancing="bias")
    layer.bias_steps.zero_()
    layer.after_step({"expert_counts": torch.tensor([0, 8, 3, 4, 5])})
    layer.after_step({})
    layer.after_step({"expert_counts": torch.tensor([0, 8, 4, 4, 4])})
    assert layer.bias_steps.tolist() == [2, -2, 1, 0, -1]
    other = token_choice(balancing="loss")
    other.after_step({"expert_counts": torch.tensor([0, 8, 3, 4, 5])})


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_one_optimizer_step_moves_the_bias_once_by_the_loads_of_all_its_micro_batches(checkpointing: str) -> None:
    batch = rows(6)
    batch["valid"] = torch.rand(6, 8) < 0.7
    overrides = ("ffn=moe", "ffn.n_experts=5", "ffn.top_k=2", "ffn.balancing=bias", "model.n_layers=1")
    given = settings(*overrides, f"model.activation_checkpointing={checkpointing}", lr=0.0)
    model = fit(given, split(batch, [1, 3, 2]), accumulate_grad_batches=3).model
    steps_E = model.blocks[0].ffn.bias_steps.clone()
    model.blocks[0].ffn.bias_steps.zero_()  # as it was during the step
    trace = model(batch["input_ids"], observe=True).traces[0]
    loads_E = torch.bincount(trace["expert_ids"][batch["valid"]].flatten(), minlength=5)
    assert torch.equal(steps_E, torch.sign(loads_E.double().mean() - loads_E).long())
    assert steps_E.any()


@LAYERS
def test_recomputation_in_backward_gives_the_same_gradients_and_counts_once(make: Any) -> None:
    layer, x_BTD = make(), torch.randn(2, 5, 7)
    results = []
    for recompute in (False, True):
        leaf_BTD = x_BTD.clone().requires_grad_()
        arguments = (leaf_BTD, context(x_BTD))
        output = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
        loss = output.y_BTD.square().sum() + sum(output.aux_losses.values())
        results.append((output, torch.autograd.grad(loss, [leaf_BTD, *layer.parameters()])))
    (plain, plain_grads), (recomputed, recomputed_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(plain_grads, recomputed_grads, strict=True))
    for name, counts_E in plain.step_stats.items():
        assert torch.equal(recomputed.step_stats[name], counts_E)
        assert counts_E.sum() == 2 * 5 * 2


def test_ranks_with_shares_of_the_whole_batch_average_to_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = build(z_loss=0.0, sequence_balance_loss=0.0)
    x_BTD = torch.randn(4, 5, 7, dtype=torch.float64)
    whole = layer(x_BTD, context(x_BTD)).aux_losses["balance"]
    chosen = layer(x_BTD, context(x_BTD, observe=True)).trace["expert_ids"]
    total_E = torch.bincount(chosen.flatten(), minlength=5)
    monkeypatch.setattr(pkm_lightning.ffn.moe, "sum_over_ranks", lambda counts_E: total_E)
    ranks = [layer(part_BTD, context(part_BTD)).aux_losses["balance"] for part_BTD in x_BTD.split(2)]
    assert_close(torch.stack(ranks).mean(), whole)
    inputs = list(layer.router.parameters())
    for of_ranks, expected in zip(
        torch.autograd.grad(torch.stack(ranks).mean(), inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        assert_close(of_ranks, expected, kind="grad")


@pytest.mark.parametrize("match", ["flops", "params"])
@pytest.mark.parametrize("ffn", ["moe", "moe_expert_choice"])
def test_sizes_can_be_solved(ffn: str, match: str) -> None:
    budget = {"flops": "match_budget=null", "params": "match_budget=3e6"}[match]
    solved = solve_size(config(f"ffn={ffn}", f"match={match}", budget))
    knob = {"flops": "hidden_dim", "params": "n_experts"}[match]
    assert isinstance(solved["ffn"][knob], int)
    assert build_meta_model(solved).blocks[0].ffn.cost().params > 0  # type: ignore[operator, union-attr]


@pytest.mark.slow
@LAYERS
def test_compiled_equals_eager(make: Any) -> None:
    """Group sizes depend on the data, so the loop runs between graphs: `fullgraph=True` is not offered on a CPU."""
    layer = make()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        compiled.train(training)
        for length in (5, 5, 8):
            x_BTD = torch.randn(2, length, 7)
            expected, actual = layer(x_BTD, context(x_BTD)), compiled(x_BTD, context(x_BTD))
            assert_close(actual.y_BTD, expected.y_BTD.detach())
            for name, loss in expected.aux_losses.items():
                assert_close(actual.aux_losses[name], loss.detach())
            expected_grads, actual_grads = (
                torch.autograd.grad(output.y_BTD.square().sum(), list(module.parameters()))
                for output, module in ((expected, layer), (actual, compiled))
            )
            for grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
                assert_close(grad, expected_grad, kind="grad")
