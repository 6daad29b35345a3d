"""A memory as the FFN of a model of transformers: every family, gradients, generation, files, what plugins report."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

from pkm_lightning import (
    PKM,
    ConfigError,
    Memory,
    MemoryPlus,
    MoE,
    TableOptimizer,
    ffn_reports,
    replace_ffn,
    row_learning_tables,
)

FAMILIES = pytest.mark.parametrize("name", pretrained_models.NAMES)
IDS = torch.arange(2, 26).view(2, 12)


@FAMILIES
def test_every_family_trains_saves_and_generates(name: str) -> None:
    model = pretrained_models.tiny(name).train()
    untouched = model.state_dict()
    (memory,) = replace_ffn(model, layers=[1], ffn=MemoryPlus, n_keys=9, knn=3)
    new = {key for key in model.state_dict() if key not in untouched}
    assert "value_tables.0.weight" in new
    assert all(key == "value_tables.0.weight" or ".mlp.plugin." in key for key in new)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in memory.parameters())
    assert model.value_tables[0].weight.grad.any()

    other = pretrained_models.tiny(name)
    replace_ffn(other, layers=[1], ffn=MemoryPlus, n_keys=9, knn=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)
    # With a cache the plugin sees one token at a time.
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    written = model.generate(IDS, **settings, use_cache=True)
    assert torch.equal(written, model.generate(IDS, **settings, use_cache=False))


def test_the_bare_decoder_and_the_dtype_of_the_layer() -> None:
    model = pretrained_models.tiny("llama").bfloat16()
    (memory,) = replace_ffn(model.model, layers=[0], ffn=Memory, n_keys=9, knn=3)
    assert {parameter.dtype for parameter in memory.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.dtype is torch.bfloat16
    assert "model.value_tables.0.weight" in model.state_dict()


def test_losses_and_statistics_are_collected_or_named() -> None:
    model = pretrained_models.tiny("qwen2").train()
    (moe,) = replace_ffn(model, layers=[0], ffn=MoE, dense_hidden_dim=16, n_experts=4, top_k=2)
    (pkm,) = replace_ffn(model, layers=[1], ffn=PKM, n_keys=9, knn=3)
    assert isinstance(pkm, PKM)
    mean = pkm.addressing.query.norm.running_mean
    before = mean.clone()
    with ffn_reports(model) as reports:
        model(IDS)
        model(IDS.flip(0))
    assert [plugin for plugin, _ in reports.outputs] == [moe, pkm, moe, pkm]
    loss = reports.aux_loss()
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert moe.router.weight.grad.any()  # type: ignore[union-attr, operator]
    assert torch.equal(mean, before)
    reports.after_step()
    assert not torch.equal(mean, before)
    unheard = r"^MoE reports losses or statistics \(balance, router_z\) that nobody collects"
    with pytest.warns(UserWarning, match="^PKM reports"), pytest.warns(UserWarning, match=unheard):
        model(IDS)
    model.eval()(IDS)  # a warning of the package would be an error


def test_activation_checkpointing_collects_losses_once_or_warns_that_they_are_lost() -> None:
    model = pretrained_models.tiny("llama").train()
    replace_ffn(model, layers=[1], ffn=MoE, dense_hidden_dim=16, n_experts=4, top_k=2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with ffn_reports(model) as reports:
        loss = model(IDS, labels=IDS).loss + reports.aux_loss()
    loss.backward()  # the forward that it repeats warns of nothing
    assert len(reports.outputs) == 1
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with ffn_reports(model) as reports:
        model(IDS)
    with pytest.warns(
        UserWarning, match=r"^the losses of MoE \(balance, router_z\) have no gradient, .*use_reentrant=False"
    ):
        reports.aux_loss()


def test_the_trainer_of_transformers_steps_rows_whose_reads_a_hook_clears(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 12, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", **settings)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    for cleared in (True, False):
        model = pretrained_models.tiny("llama")
        replace_ffn(model, layers=[1], ffn=MemoryPlus, n_keys=9, knn=3, learning="rows")
        dense = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        optimizer = TableOptimizer(dense, row_learning_tables(model), lr=1e-2)
        if cleared:
            optimizer.register_step_post_hook(lambda done, *_: done.zero_grad())
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # type: ignore[arg-type]
        with contextlib.nullcontext() if cleared else pytest.raises(ConfigError, match="register_step_post_hook"):
            trainer.train()


def test_a_module_of_another_kind_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^the FFN torch.nn.modules.linear.Identity breaks its contract: forward takes"
    ):
        replace_ffn(pretrained_models.tiny("llama"), layers=[0], ffn=torch.nn.Identity)


def test_another_architecture_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, **sizes))
    with pytest.raises(
        ConfigError, match=r"^replace_ffn knows no layers of a GPTNeoXForCausalLM \(model_type 'gpt_neox'"
    ):
        replace_ffn(model, layers=[0], ffn=MemoryPlus)
