"""The tests that every FFN plugin must pass, each in a small transformer built from the plugin's YAML.

A test module subclasses `PluginContract` and parametrises `case`; `test_every_plugin.py` does so for `configs/ffn`.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ffn.drawn_weights import draw
from ffn.recorded_reads import check_reads, recorded_reads
from tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import config

from pkm_lightning.build.model import build_meta_model, build_model
from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.ffn import HasAfterStep, HasCost, HasSlots
from pkm_lightning.model import ModelOutput, Transformer, model_cost
from pkm_lightning.model.block import named_plugins
from pkm_lightning.model.plugin_outputs import plugin_entries

#: Odd sizes everywhere that a plugin takes them.
SIZES = ("model.n_layers=2", "model.dim=14", "model.n_heads=1", "model.n_kv_heads=1", "model.ffn_dim=23")
MEMORY_SIZES = ("model.memory={n_keys: 6, heads: 3, knn: 5, key_dim: 10}",)


@dataclass(frozen=True, eq=False)
class Case:
    """A plugin with its options.

    Args:
        ffn: the name of its YAML.
        changes: values that replace those of the YAML.
        title: the name in the output of the tests.
        config_dir: a folder with `ffn/NAME.yaml`, for a plugin outside of `configs/`.
    """

    ffn: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    config_dir: Path | None = None

    def __str__(self) -> str:
        return ", ".join(filter(None, [self.ffn, self.title]))

    def settings(self) -> dict[str, Any]:
        search = [] if self.config_dir is None else [f"hydra.searchpath=[file://{self.config_dir}]"]
        composed = config(f"ffn={self.ffn}", *SIZES, *MEMORY_SIZES, *search)
        composed["ffn"] |= self.changes
        return composed


@functools.cache
def built(case: Case) -> Transformer:
    model = build_model(case.settings())
    draw(model)
    return model


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(5))


def run(model: Transformer, ids_BT: Tensor, **options: Any) -> ModelOutput:
    """Runs one forward from a fixed state of the random generator."""
    torch.manual_seed(1)
    output: ModelOutput = model(ids_BT, **options)
    return output


def plugins(model: Transformer) -> list[nn.Module]:
    return [plugin for block in model.blocks for _, plugin in named_plugins(block)]  # type: ignore[arg-type]


def check_compiled(case: Case, lengths: Sequence[int]) -> None:
    """Compares a compiled block with the eager one at some lengths, of which the last must not compile it again.

    Only loops over experts may break the graph.
    """
    settings = case.settings()
    settings["model"]["n_layers"] = 1
    if not isinstance(settings["placement"]["layers"], str):
        settings["placement"]["layers"] = [0]
    model = build_model(settings).train()
    draw(model)
    compiled = copy.deepcopy(model)
    # The experts' shares of tokens depend on the data.
    whole = not any(isinstance(module, SwiGLUExperts) for module in model.modules())
    counter, frames = CompileCounterWithBackend("aot_eager"), []
    compiled.blocks[0].compile(backend=counter, fullgraph=whole)
    for length in lengths:
        outputs = [run(other, ids()[:, :length]) for other in (compiled, model)]
        assert_close(*(output.hidden_BTD for output in outputs))
        assert outputs[0].aux_losses.keys() == outputs[1].aux_losses.keys()
        for output in outputs:
            (output.hidden_BTD.square().sum() + sum(output.aux_losses.values())).backward()
        for p, expected in zip(compiled.parameters(), model.parameters(), strict=True):
            if expected.grad is not None and p.grad is not None:
                assert_close(p.grad, expected.grad, kind="grad")
            assert (p.grad is None) == (expected.grad is None)
            p.grad = expected.grad = None
        frames.append(counter.frame_count)
    # The second length makes the sizes symbolic; a size that is taken for a constant would compile every length.
    assert frames[-1] == frames[-2]
    torch._dynamo.reset()


class PluginContract:
    """What the transformer and the reports rely on."""

    @pytest.fixture
    def model(self, case: Case) -> Transformer:
        return copy.deepcopy(built(case))

    def test_cost_and_reads_are_those_of_a_forward(self, model: Transformer) -> None:
        cost, counted, calls = model_cost(model, 9), {}, {}
        # 18 tokens: expert choice then gives each of 3 experts a whole number of them.
        for training in (True, False):
            with (
                FlopCounterMode(display=False) as counter,
                sdpa_kernel(SDPBackend.MATH),
                recorded_reads(18) as calls[training],
            ):
                run(model.train(training), ids())
            counted[training] = counter.get_total_flops()
        assert cost.trunk_train_flops * 18 == counted[True]
        assert cost.trunk_flops * 18 == counted[False]
        assert cost.params_total == sum(p.numel() for p in model.parameters())
        check_reads(model, calls[True])
        gathered = sum(call.ids * call.reads * call.table.dim // call.table.slices * 4 for call in calls[False])
        lookup_bytes = 0
        for plugin in plugins(model):
            assert isinstance(plugin, HasCost)
            assert plugin.cost().params == sum(p.numel() for p in plugin.parameters())
            lookup_bytes += plugin.cost().lookup_bytes
        assert lookup_bytes == gathered

    def test_only_the_past_is_used(self, model: Transformer) -> None:
        """Checks causality at evaluation, and in training unless `causal_in_training` is False."""
        ids_BT = ids()
        changed_BT = ids_BT.clone()
        changed_BT[:, 5:] = (changed_BT[:, 5:] + 7) % 50
        before_BTD, after_BTD = (run(model.eval(), x_BT).hidden_BTD for x_BT in (ids_BT, changed_BT))
        assert_close(after_BTD[:, :5], before_BTD[:, :5])
        assert bool((after_BTD[:, 5:] != before_BTD[:, 5:]).any(-1).all())
        before_BTD, after_BTD = (run(model.train(), x_BT).hidden_BTD[:, :5] for x_BT in (ids_BT, changed_BT))
        causal = all(getattr(plugin, "causal_in_training", True) for plugin in plugins(model))
        assert torch.allclose(after_BTD, before_BTD, rtol=1e-5, atol=1e-5) is causal

    def test_packed_documents_are_read_as_if_alone(self, model: Transformer) -> None:
        """Packs documents of 4, 1 and 3 tokens, with end tokens in them, and one of padding."""
        doc_ids_BT, ids_BT = torch.tensor([[5] * 4 + [6] + [9] * 3 + [-1]]).expand(2, -1), ids().clone()
        ids_BT[0, [1, 4, 7]] = 0
        packed_BTD = run(model.eval(), ids_BT, doc_ids_BT=doc_ids_BT, valid_BT=doc_ids_BT >= 0).hidden_BTD
        for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
            assert_close(packed_BTD[:, part], run(model, ids_BT[:, part]).hidden_BTD)

    def test_a_cache_gives_the_full_forward(self, model: Transformer) -> None:
        """Reads prompts of 3 and 5 tokens, one padded, then the rest one by one and in pairs.

        `tests/model/test_cached_decoding.py` decodes with the plugins of the package at length.
        """
        if not model.eval().is_cacheable:
            with pytest.raises(ValueError, match="neither position_wise"):
                model.new_cache(2, 9)
            return
        full_BTD = run(model, ids()).hidden_BTD
        shorter_BTD = run(model, ids()[1:, 2:]).hidden_BTD
        cache, valid_BT = model.new_cache(2, 9), torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
        parts = [run(model, ids()[:, :5], valid_BT=valid_BT, cache=cache).hidden_BTD]
        for start, end in itertools.pairwise([5, 6, 7, 9]):
            parts.append(run(model, ids()[:, start:end], cache=cache).hidden_BTD)
        cached_BTD = torch.cat(parts, dim=1)
        assert_close(cached_BTD[0], full_BTD[0])
        assert_close(cached_BTD[1, 2:], shorter_BTD[0])

    def test_parameters_learn_also_with_activation_checkpointing(self, model: Transformer) -> None:
        plain, recomputed = model.train(), copy.deepcopy(model)
        recomputed.activation_checkpointing = True
        upstream_BTD, outputs = torch.randn(4, 9, 14), []
        for other in (plain, recomputed):
            output = run(other, ids(4, 9))
            (output.hidden_BTD * upstream_BTD).sum().add(sum(output.aux_losses.values())).backward()
            outputs.append(output)
        silent = [n for n, p in plain.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert silent == ["unembedding.weight"]
        assert all(p.grad is None for p in plain.parameters() if not p.requires_grad)
        assert all(bool(p.grad.isfinite().all()) for p in plain.parameters() if p.grad is not None)
        assert torch.equal(outputs[0].hidden_BTD, outputs[1].hidden_BTD)
        for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert_close(q.grad, p.grad, kind="grad")
        for layer, stats in outputs[0].step_stats.items():
            assert all(torch.equal(outputs[1].step_stats[layer][n], value) for n, value in stats.items())
        for (name, b), c in zip(plain.named_buffers(), recomputed.named_buffers(), strict=True):
            assert torch.equal(b, c[1]), name

    def test_copies_give_the_same_output_and_are_independent(self, model: Transformer) -> None:
        expected_BTD = run(model.eval(), ids()).hidden_BTD
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        loaded = copy.deepcopy(model)
        loaded.init_weights(4)
        assert not torch.equal(run(loaded, ids()).hidden_BTD, expected_BTD)
        loaded.load_state_dict(torch.load(buffer, weights_only=True))
        copied = copy.deepcopy(model)
        for other in (copied, pickle.loads(pickle.dumps(model)), loaded, copy.deepcopy(model).double().float()):
            assert torch.equal(run(other, ids()).hidden_BTD, expected_BTD)
        optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
        run(copied.train(), ids()).hidden_BTD.square().sum().backward()
        optimizer.step()
        assert torch.equal(run(model, ids()).hidden_BTD, expected_BTD)

    def test_bf16_and_autocast_are_close_and_one_token_is_enough(self, model: Transformer) -> None:
        expected_BTD = run(model.eval(), ids()).hidden_BTD
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed_BTD = run(model, ids()).hidden_BTD
        token_BTD = run(model, ids(1, 1)).hidden_BTD
        low_BTD = run(model.to(torch.bfloat16), ids()).hidden_BTD
        for y_BTD in (mixed_BTD, low_BTD):
            # Another rounding may select another slot or expert, which changes little of the whole output.
            assert (y_BTD.float() - expected_BTD).norm() / expected_BTD.norm() < 0.2
        assert token_BTD.shape == (1, 1, 14)
        assert bool(token_BTD.isfinite().all())

    def test_padding_enters_no_loss_and_no_statistics(self, model: Transformer) -> None:
        valid_BT = torch.ones(2, 9, dtype=torch.bool)
        valid_BT[1, 6:] = False
        padded_BT = torch.where(valid_BT, ids(), (ids() + 3) % 50)
        first, second = (run(model.train(), ids_BT, valid_BT=valid_BT) for ids_BT in (ids(), padded_BT))
        assert_close(second.hidden_BTD[valid_BT], first.hidden_BTD[valid_BT])
        for name, loss in first.aux_losses.items():
            assert_close(second.aux_losses[name], loss)
        for layer, stats in first.step_stats.items():
            for name, value in stats.items():
                assert_close(second.step_stats[layer][name].float(), value.float())

    def test_only_after_step_moves_buffers_by_statistics(self, model: Transformer) -> None:
        before = [buffer.clone() for buffer in model.train().buffers()]
        output = run(model, ids())
        assert all(torch.equal(b, c) for b, c in zip(before, model.buffers(), strict=True))
        for layer, stats in output.step_stats.items():
            for name, plugin in named_plugins(model.blocks[layer]):  # type: ignore[arg-type]
                if isinstance(plugin, HasAfterStep):
                    plugin.after_step(plugin_entries(name, stats))
        moved = any(not torch.equal(b, c) for b, c in zip(before, model.buffers(), strict=True))
        assert moved is bool(output.step_stats)

    def test_traces_hold_the_slots_and_observing_changes_no_output(self, model: Transformer) -> None:
        for training in (True, False):
            plain = run(model.train(training), ids())
            observed = run(model, ids(), observe=True)
            assert plain.traces == {}
            assert torch.equal(observed.hidden_BTD, plain.hidden_BTD)
            for layer, block in enumerate(model.blocks):
                for name, plugin in named_plugins(block):  # type: ignore[arg-type]
                    trace = plugin_entries(name, observed.traces.get(layer, {}))
                    assert not any(value.requires_grad for value in trace.values())
                    for slots in plugin.slots() if isinstance(plugin, HasSlots) else []:
                        weights = trace[f"{slots.name}_weights"]
                        assert weights.shape[:2] == (2, 9)
                        if f"{slots.name}_chosen" in trace:
                            assert weights.shape == trace[f"{slots.name}_chosen"].shape == (2, 9, slots.count)
                            continue
                        slot_ids = trace[f"{slots.name}_ids"]
                        assert slot_ids.shape == weights.shape
                        assert int(slot_ids.min()) >= 0
                        assert int(slot_ids.max()) < slots.count

    def test_a_meta_model_runs_and_materialises_to_the_same(self, case: Case, model: Transformer) -> None:
        meta = build_meta_model(case.settings())
        for training in (True, False):
            assert run(meta.train(training), ids().to("meta")).hidden_BTD.shape == (2, 9, 14)
        meta.to_empty(device="cpu")
        draw(meta)
        assert torch.equal(run(meta.eval(), ids()).hidden_BTD, run(model.eval(), ids()).hidden_BTD)

    @pytest.mark.slow
    def test_compiled_blocks_give_the_same_output_and_gradients(self, case: Case) -> None:
        check_compiled(case, lengths=(9, 8, 7, 6))
