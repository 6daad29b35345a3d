"""What the contract asks of every plugin, held against each YAML of `configs/ffn` in a small transformer.

Letters: B sequences, T tokens, D model dimension.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import config
from tree import ROOT

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.ffn import HasCost
from pkm_lightning.model import ModelOutput, Transformer, model_cost
from pkm_lightning.model.placement import named_plugins

NAMES = sorted(path.stem for path in (ROOT / "configs" / "ffn").glob("*.yaml") if path.stem != "custom")
#: Odd sizes everywhere that a plugin takes them.
SIZES = ["model.dim=14", "model.n_heads=1", "model.n_kv_heads=1", "model.ffn_dim=23"]
SIZES += ["model.memory={n_keys: 6, heads: 3, knn: 5, key_dim: 10}"]
OWN = {
    "moe": ["ffn.n_experts=5", "ffn.top_k=3", "ffn.sequence_balance_loss=0.1"],
    "moe_expert_choice": ["ffn.n_experts=3"],
    "ultramem": ["ffn.value_dim=6", "ffn.spectrum_margin=0"],
    "ultramem_v2": ["ffn.value_dim=5", "ffn.balance_loss=0.1"],
    "moe, balanced by bias": [
        "ffn=moe",
        "ffn.n_experts=5",
        "ffn.top_k=3",
        "ffn.balancing=bias",
        "ffn.shared_experts=2",
    ],
    "memory_plus, losses": ["ffn=memory_plus", "ffn.cures={simvq: true, balance_loss: 0.1, entropy_loss: 0.1}"],
    "memory, straight through": ["ffn=memory", "ffn.cures={straight_through: true, gumbel_noise: 0.1}"],
    "pkm, noise": ["ffn=pkm", "ffn.cures={gumbel_noise: 0.1, entropy_loss: 0.1}"],
    "memory_plus, sigmoid gate": [
        "ffn=memory_plus",
        "ffn.gate=sigmoid",
        "ffn.value_projection=true",
        "ffn.value_dim=9",
    ],
    "memory_plus, no gate": ["ffn=memory_plus", "ffn.gate=none", "ffn.temperature=true", "ffn.activation=relu"],
    "peer, glu": ["ffn=peer", "ffn.glu=true", "ffn.router=sigmoid", "ffn.query_norm=rms"],
}
#: Values that a token reads in all layers, in training where that is more: heads x knn x values a slot x layers.
READS = {
    "memory": 15 * 14, "pkm": 15 * 14, "pkm, noise": 15 * 14, "memory, straight through": (15 * 14, 75 * 14),
    "memory_plus": 3 * 15 * 14, "memory_plus, losses": 3 * 15 * 14, "memory_plus, no gate": 3 * 15 * 14,
    "memory_plus, sigmoid gate": 3 * 15 * 9, "peer": 2 * 15 * 14, "peer, glu": 3 * 15 * 14,
    "ultramem": 15 * 6, "ultramem_v2": 3 * 2 * 5 * 5,
}  # fmt: skip
#: In training the output of a token depends on later tokens too: batch normalisation, expert choice.
BATCHWISE = {"pkm", "pkm, noise", "peer", "moe_expert_choice"}
ALL = [*NAMES, *(name for name in OWN if name not in NAMES)]
EVERY = pytest.mark.parametrize("name", ALL)
#: Of the kinds of table reads one each; compiling takes seconds.
COMPILED_OFTEN = ("memory_plus", "peer")


def overrides(name: str) -> list[str]:
    own = OWN.get(name, [])
    return [*(own if own[:1] and own[0].startswith("ffn=") else [f"ffn={name}", *own]), *SIZES]


def reads(name: str, *, training: bool) -> int:
    stated = READS.get(name, 0)
    return stated if isinstance(stated, int) else stated[training]


def build(name: str, *more: str) -> Transformer:
    model = build_model(config(*overrides(name), *more))
    model.init_weights(3)
    return model


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(5))


def hidden(model: Transformer, ids_BT: Tensor) -> Tensor:
    output: ModelOutput = model(ids_BT)
    return output.hidden_BTD


@EVERY
def test_costs_equal_the_built_module_and_the_counter(name: str) -> None:
    model = build(name).eval()
    cost = model_cost(model, 9)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        hidden(model, ids())
    assert cost.trunk_flops * 18 == counter.get_total_flops()
    assert cost.params_total == sum(p.numel() for p in model.parameters())
    for block in model.blocks:
        for _, plugin in named_plugins(block.ffn):
            assert isinstance(plugin, HasCost)
            assert plugin.cost().params == sum(p.numel() for p in plugin.parameters())


@EVERY
def test_training_costs_equal_the_counter(name: str) -> None:
    model = build(name).train()
    # 18 tokens: expert choice then gives each of 3 experts a whole number of them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden(model, ids())
    assert model_cost(model, 9).trunk_train_flops * 18 == counter.get_total_flops()
    moved = sum(plugin.cost().lookup_bytes for block in model.blocks for _, plugin in named_plugins(block.ffn))
    assert moved == 4 * reads(name, training=False)


@EVERY
def test_later_tokens_change_nothing_at_evaluation(name: str) -> None:
    model = build(name).eval()
    ids_BT = ids()
    before_BTD = hidden(model, ids_BT)
    for t in (0, 4, 8):
        changed_BT = ids_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 50
        after_BTD = hidden(model, changed_BT)
        assert_close(after_BTD[:, :t], before_BTD[:, :t])
        assert not torch.equal(after_BTD[:, t], before_BTD[:, t])


@EVERY
def test_later_tokens_in_training_change_what_the_papers_say(name: str) -> None:
    model = build(name).train()
    ids_BT = ids()
    changed_BT = ids_BT.clone()
    changed_BT[:, 5:] = (changed_BT[:, 5:] + 7) % 50
    torch.manual_seed(1)
    before_BTD = hidden(model, ids_BT)
    torch.manual_seed(1)
    same = torch.allclose(hidden(model, changed_BT)[:, :5], before_BTD[:, :5], rtol=1e-5, atol=1e-5)
    assert same is (name not in BATCHWISE)


@EVERY
def test_every_trainable_parameter_learns(name: str) -> None:
    model = build(name).train()
    output = model(ids(4, 9))
    (output.hidden_BTD * torch.randn_like(output.hidden_BTD)).sum().add(sum(output.aux_losses.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == ["unembedding.weight"]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@EVERY
def test_copies_give_the_same_output(name: str) -> None:
    model = build(name).eval()
    expected_BTD = hidden(model, ids())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = build_model(config(*overrides(name))).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        loaded,
        copy.deepcopy(model).double().float(),
    ):
        assert torch.equal(hidden(other, ids()), expected_BTD)


@EVERY
def test_a_copy_and_another_variant_leave_a_model_alone(name: str) -> None:
    model, other = build(name).eval(), build("memory_plus")
    before_BTD = hidden(model, ids())
    for trained in (copy.deepcopy(model).train(), other):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        hidden(trained, ids()).square().sum().backward()
        optimizer.step()
    assert torch.equal(hidden(model, ids()), before_BTD)


@EVERY
def test_bf16_and_autocast_are_finite_and_close(name: str) -> None:
    model = build(name).eval()
    expected_BTD = hidden(model, ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_BTD = hidden(model, ids())
    low_BTD = hidden(copy.deepcopy(model).to(torch.bfloat16), ids())
    for y_BTD in (mixed_BTD, low_BTD):
        # Another rounding may choose another slot or expert; most of the output is as it was.
        away = (y_BTD.float() - expected_BTD).norm() / expected_BTD.norm()
        assert away < 0.2


@EVERY
def test_one_token_alone(name: str) -> None:
    model = build(name).eval()
    y_BTD = hidden(model, ids(1, 1))
    assert y_BTD.shape == (1, 1, 14)
    assert bool(y_BTD.isfinite().all())


@EVERY
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    plain, recomputed = build(name).train(), build(name, "model.activation_checkpointing=true").train()
    outputs = []
    for model in (plain, recomputed):
        torch.manual_seed(1)
        output = model(ids())
        output.hidden_BTD.square().sum().add(sum(output.aux_losses.values())).backward()
        outputs.append(output)
    assert torch.equal(outputs[0].hidden_BTD, outputs[1].hidden_BTD)
    for (parameter_name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.grad is not None:
            assert_close(q.grad, p.grad, kind="grad")
        assert (p.grad is None) == (q.grad is None), parameter_name
    for layer, stats in outputs[0].step_stats.items():
        assert all(torch.equal(outputs[1].step_stats[layer][n], value) for n, value in stats.items())
    for (buffer_name, b), c in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(b, c), buffer_name


@EVERY
def test_padding_enters_no_loss_and_no_statistics(name: str) -> None:
    model = build(name).train()
    valid_BT = torch.ones(2, 9, dtype=torch.bool)
    valid_BT[1, 6:] = False
    first_BT = ids()
    second_BT = torch.where(valid_BT, first_BT, (first_BT + 3) % 50)
    outputs = []
    for ids_BT in (first_BT, second_BT):
        torch.manual_seed(1)
        outputs.append(model(ids_BT, valid_BT=valid_BT))
    first, second = outputs
    assert_close(second.hidden_BTD[valid_BT], first.hidden_BTD[valid_BT])
    for loss_name, loss in first.aux_losses.items():
        assert_close(second.aux_losses[loss_name], loss)
    for layer, stats in first.step_stats.items():
        for stat_name, value in stats.items():
            assert_close(second.step_stats[layer][stat_name].float(), value.float())


@EVERY
def test_statistics_of_a_step_move_buffers_once_it_is_over(name: str) -> None:
    model = build(name).train()
    before = [buffer.clone() for buffer in model.buffers()]
    output = model(ids())
    assert all(torch.equal(b, c) for b, c in zip(before, model.buffers(), strict=True))
    for layer, stats in output.step_stats.items():
        for _, plugin in named_plugins(model.blocks[layer].ffn):
            plugin.after_step({n.removeprefix("variant."): value for n, value in stats.items()})
    moved = any(not torch.equal(b, c) for b, c in zip(before, model.buffers(), strict=True))
    assert moved is (name in {"pkm", "pkm, noise", "peer", "moe, balanced by bias"})


@EVERY
def test_a_meta_model_materialises_to_the_same(name: str) -> None:
    model = build_meta_model(config(*overrides(name)))
    model.to_empty(device="cpu")
    model.init_weights(3)
    assert torch.equal(hidden(model.eval(), ids()), hidden(build(name).eval(), ids()))


@pytest.mark.parametrize(
    "name",
    [name if name in COMPILED_OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in ALL],
)
def test_compiled_blocks_give_the_same_output_and_gradients(name: str) -> None:
    """In one graph a block; only the loop over experts breaks it, since their shares of tokens depend on the data."""
    model = build(name).train()
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=not name.startswith("moe"))
    torch.manual_seed(1)
    y_BTD = hidden(compiled, ids())
    torch.manual_seed(1)
    expected_BTD = hidden(model, ids())
    assert_close(y_BTD, expected_BTD)
    for part_BTD in (y_BTD, expected_BTD):
        part_BTD.square().sum().backward()
    for p, expected in zip(compiled.parameters(), model.parameters(), strict=True):
        if expected.grad is not None and p.grad is not None:
            assert_close(p.grad, expected.grad, kind="grad")
        assert (p.grad is None) == (expected.grad is None)
    torch._dynamo.reset()
