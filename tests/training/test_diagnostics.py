"""Diagnostics equal a plain recomputation, and do not change the training."""

from __future__ import annotations

import math
from typing import Any

import distributed_jobs as jobs
import faults
import lightning as L
import pytest
import torch
from rank_group import Groups
from tolerances import assert_close
from torch import nn
from toys import config

from pkm_lightning.build.model import build_model
from pkm_lightning.callbacks import Diagnostics, diagnostics
from pkm_lightning.ffn import FFNOutput
from pkm_lightning.memory import Addressing
from pkm_lightning.model.rope import apply_rope
from pkm_lightning.training.diagnostics import largest_values, local_weights, probe

MEMORY = {"query_norm", "key_norm", "score_max", "score_min", "weight_top"}


def model(*overrides: str) -> Any:
    made = build_model(
        config("model.dim=32", "model.n_heads=2", "model.n_kv_heads=1", "model.memory.n_keys=8", *overrides)
    )
    made.init_weights(1)
    return made


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(50, (rows, 6)), "labels": torch.zeros(rows, 6, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("ffn", "names"),
    [
        ("memory_plus", MEMORY), ("pkm", MEMORY), ("peer", MEMORY), ("ultramem", MEMORY), ("ultramem_v2", MEMORY),
        ("moe", {"router_logit_max", "router_top"}), ("moe_expert_choice", {"router_logit_max", "router_top"}),
        ("engram", {"memory_gate", "memory_share"}), ("dense", set()), ("ple", set()), ("stem", set()),
    ],
)  # fmt: skip
def test_every_plugin_has_its_diagnostics(ffn: str, names: set[str]) -> None:
    found = probe(model(f"ffn={ffn}"), batch())
    inside = {name for layer, values in found.items() if layer is not None for name in values}
    assert inside == {"attention_logit_max", *names}
    assert found[None].keys() == {"output_logit_max", "log_partition"}
    assert all(math.isfinite(value) for values in found.values() for value in values.values())


def test_attention_logits_are_those_of_what_a_query_may_see() -> None:
    made, data = model("ffn=dense"), batch(1)
    attention, seen = made.blocks[0].attention, {}
    attention.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], shared=inputs[1]))
    found = probe(made, data)[0]["attention_logit_max"]
    x_TD, shared = seen["x"][0], seen["shared"]
    with torch.no_grad():
        q_HTC, k_GTC = ((w(x_TD)).view(6, -1, 16).transpose(0, 1) for w in (attention.query, attention.key))
        q_HTC, k_GTC = (apply_rope(v[None], shared.cos_B1TF, shared.sin_B1TF)[0] for v in (q_HTC, k_GTC))
        logits = [float(q_HTC[h, t] @ k_GTC[0, s]) / 4 for h in range(2) for t in range(6) for s in range(t + 1)]
    assert float(found) == pytest.approx(max(map(abs, logits)))


def test_scores_and_norms_are_those_of_the_memory() -> None:
    made, data = model("ffn=memory_plus"), batch(2)
    addressing = next(m for m in made.modules() if isinstance(m, Addressing))
    seen: dict[str, Any] = {}
    addressing.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], read=output))
    found = probe(made, data, n_sequences=2)[0]
    with torch.no_grad():
        q_TH2E, _ = addressing.query(seen["x"])
        first_HTS, second_HTS = addressing.keys(q_TH2E)
        all_HTSS = first_HTS.unsqueeze(-1) + second_HTS.unsqueeze(-2)
    assert_close(found["score_max"], all_HTSS.max())
    assert_close(found["query_norm"], q_TH2E.square().sum(-1).sqrt().mean())
    assert_close(found["weight_top"], seen["read"].weights_THK.max(-1).values.mean())


def test_looking_changes_neither_modes_nor_random_numbers_nor_gradients() -> None:
    made = model("ffn=memory_plus", "ffn.cures.gumbel_noise=1.0")
    made.train()
    data, state = batch(), torch.get_rng_state()
    probe(made, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())
    assert not any(module._forward_hooks for module in made.modules())


@pytest.mark.parametrize("overrides", ["ffn=memory_plus", "ffn=peer trainer.accumulate_grad_batches=2"])
def test_a_run_with_diagnostics_has_the_losses_of_one_without(overrides: str) -> None:
    given = jobs.settings("strategy=single", *overrides.split(), steps=4)
    usual = jobs.fit(given, 4)[2]
    seen = jobs.fit(given, 4, watching=[Diagnostics(rows=1)])[2]
    for one, other in zip(usual, seen, strict=True):
        assert {name: other[name] for name in one} == one


def test_update_ratios_are_those_of_the_step() -> None:
    weights: list[dict[str, torch.Tensor]] = []

    class Copy(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            weights.append({name: value.clone() for name, value in local_weights(pl_module).items()})

    module, _, seen = jobs.fit(
        jobs.settings("ffn=memory_plus", "strategy=single", steps=3), 3, watching=[Copy(), Diagnostics(rows=1)]
    )
    after = local_weights(module)
    name = "model.tables.0.weight"
    expected = (after[name] - weights[2][name]).norm() / weights[2][name].norm()
    assert seen[2]["train/vitals/update_ratio_table"] == pytest.approx(float(expected))
    apart = ("model.tables.0.weight", "model.embedding.weight")
    names = [n for n, p in module.named_parameters() if p.ndim >= 2 and n not in apart]
    moved = torch.stack([(after[n] - weights[2][n]).norm() for n in names]).norm()
    size = torch.stack([weights[2][n].norm() for n in names]).norm()
    assert seen[2]["train/vitals/update_ratio_matrix"] == pytest.approx(float(moved / size))
    rows = after[name].square().sum(1).mean().sqrt()
    assert seen[2]["train/vitals/value_norm"] == pytest.approx(float(rows))


@pytest.mark.parametrize(
    ("strategy", "shard"),
    [
        pytest.param("ddp", "dim", marks=pytest.mark.slow),
        ("fsdp", "row"),
        pytest.param("deepspeed_1", "dim", marks=pytest.mark.slow),
        pytest.param("deepspeed_3", "row", marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one_process(ranks: Groups, strategy: str, shard: str) -> None:
    alone = jobs.watch_diagnostics(["strategy=single", "ffn=memory_plus"])
    for found in ranks(2).run(
        jobs.watch_diagnostics, [f"strategy={strategy}", "ffn=memory_plus", f"table.shard={shard}"]
    ):
        assert found.keys() == alone.keys()
        for name in ("value_norm", "update_ratio_table", "update_ratio_matrix", "key_norm", "output_logit_max"):
            # Of one process the first row is looked at, of two the first of each half.
            rel = 1e-3 if "logit" not in name else 1.0
            assert found[f"train/vitals/{name}"] == pytest.approx(alone[f"train/vitals/{name}"], rel=rel), name


class Odd(nn.Module):
    """A plugin with a scalar parameter, and a part that is called by keyword and has diagnostics."""

    class Part(nn.Module):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        def diagnostics(self, output: torch.Tensor, *, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"odd_max": (output - x).abs().max()}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.tensor(1.0)), self.Part()

    def forward(self, x_BTD: torch.Tensor, context: Any) -> FFNOutput:
        return FFNOutput(self.scale * self.part(x=x_BTD))


def test_odd_plugins_are_looked_at_too() -> None:
    given = jobs.settings("ffn=dense", "strategy=single", steps=2)
    given["ffn"] = {"_target_": f"{__name__}.Odd"}
    given["placement"]["layers"] = [1]
    seen = jobs.fit(given, 2, watching=[Diagnostics(rows=1)])[2]
    assert seen[1]["train/vitals/odd_max"] > 0


def test_looking_leaves_every_module_in_its_mode_and_other_entries_of_a_batch_alone() -> None:
    made = model("ffn=memory_plus")
    made.train()
    made.blocks[0].eval()
    before = [module.training for module in made.modules()]
    probe(made, {**batch(), "scale": torch.tensor(2.0)})
    assert [module.training for module in made.modules()] == before


def test_a_sample_is_of_values_not_of_rows() -> None:
    assert diagnostics._sample(torch.zeros(4, 2**20)).numel() == 2**18
    assert diagnostics._sample(torch.zeros(())).numel() == 1
    assert diagnostics._sample(torch.arange(10.0)).tolist() == list(range(10))


def test_what_is_not_finite_on_any_rank_shows_on_all(ranks: Groups) -> None:
    assert ranks(2).run(faults.extreme_of_ranks) == [[math.inf, -math.inf, 2.0]] * 2


def test_the_largest_value_shows_what_is_not_finite() -> None:
    values = largest_values([torch.tensor([1.0, -3.0]), torch.tensor([0.0, math.nan]), torch.tensor([-math.inf, 2.0])])
    assert values[0] == 3.0
    assert values[1].isnan()
    assert values[2] == math.inf
    assert largest_values([torch.zeros(0)]).tolist() == [0.0]
