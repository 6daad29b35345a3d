"""Models with any FFN plugin as a class of transformers: logits, generation, loss, saving, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.folders import VOCAB, export, ids, logits
from safetensors.torch import load_file
from tolerances import assert_close
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from tree import ffns_without_files

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.huggingface import PkmLightningForCausalLM

NAMES = ffns_without_files()
#: Sizes that the small model needs in place of the YAML's. A dense model is Llama unless its activation is another.
CHANGES: dict[str, dict[str, Any]] = {
    "dense": {"activation": "squared_relu"},
    "engram": {"rows": 30},
    "moe": {"n_experts": 5, "top_k": 3},
    "moe_expert_choice": {"n_experts": 3},
    "ultramem": {"value_dim": 6, "spectrum_margin": 0},
    "ultramem_v2": {"value_dim": 5},
}


class Causal(nn.Module):
    """A plugin that reads earlier tokens, so that no cache serves."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x_BTD: torch.Tensor, context: FFNContext) -> FFNOutput:
        counts_T1 = torch.arange(1, x_BTD.shape[1] + 1).unsqueeze(1)
        return FFNOutput(self.linear(x_BTD.cumsum(1) / counts_T1))


#: PKM behind a layer of MoE, Memory+ in the other one.
MIXTURE = (
    "memory_plus placement.layers=[1] extra_ffns=pkm extra_ffns.pkm.placement.layers=[0] "
    "extra_ffns.pkm.placement.mode=after ffn@model.base_ffn=moe model.base_ffn.n_experts=8"
)


@pytest.mark.parametrize("ffn", [*NAMES, MIXTURE])
def test_every_plugin_loads_generates_and_is_saved_bit_for_bit(ffn: str, tmp_path: Path) -> None:
    model, folder = export(tmp_path, *f"ffn={ffn}".split(), "model.tied=true", changes=CHANGES.get(ffn))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, PkmLightningForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, logits(model, ids()))
    check_generation(loaded, num_beams=1)
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    expected = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    assert stored.keys() == expected.keys()  # tied weights and shared tables once
    assert all(torch.equal(stored[name], value) for name, value in expected.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), expected.values(), strict=True))
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, logits(model, ids()))


def check_generation(model: Any, **options: Any) -> None:
    """Compares answers to a padded batch with a cache, without one, and to each prompt alone."""
    input_ids, lengths = ids(2, 7), (7, 3)
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    seen: list[int] = []
    hook = model.transformer.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    cached = model.generate(input_ids, attention_mask=mask, use_cache=True, **options)
    hook.remove()
    assert seen == [7, *[1] * 5]
    assert torch.equal(cached, model.generate(input_ids, attention_mask=mask, use_cache=False, **options))
    if not options["do_sample"]:
        for row, length in enumerate(lengths):
            alone = model.generate(input_ids[row : row + 1, -length:], use_cache=False, **options)
            answers = len(cached) // 2
            assert torch.equal(alone[:, length:], cached[row * answers : (row + 1) * answers, 7:])


#: A memory that remembers nothing of earlier tokens, and one that does.
@pytest.fixture(scope="module", params=["memory_plus", "engram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("memory"), f"ffn={request.param}", changes=CHANGES.get(request.param))[1]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beam_search_reorders_the_cache(loaded: Any, options: dict[str, int]) -> None:
    check_generation(loaded, **options)


def test_sampled_answers_need_no_cache_either(loaded: Any) -> None:
    answers = []
    for cached in (True, False):
        torch.manual_seed(2)
        answers.append(loaded.generate(ids(), do_sample=True, top_p=0.9, max_new_tokens=8, use_cache=cached))
    assert torch.equal(*answers)


def test_prompt_lookup_crops_the_cache(loaded: Any) -> None:
    input_ids = ids(1, 4).repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        loaded.generate(input_ids, prompt_lookup_num_tokens=3, **options), loaded.generate(input_ids, **options)
    )


def test_logits_of_a_continued_cache_and_of_chosen_positions(loaded: Any) -> None:
    with torch.no_grad():
        whole = loaded(ids()).logits
        first = loaded(ids()[:, :4], use_cache=True)
        second = loaded(ids()[:, 4:], cache=first.cache, logits_to_keep=2)
    assert_close(second.logits, whole[:, -2:])
    assert loaded(ids()).cache is None


def test_the_loss_is_the_mean_over_targets_plus_auxiliary_losses(tmp_path: Path) -> None:
    model, folder = export(tmp_path, "ffn=moe", changes=CHANGES["moe"])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    labels = ids().clone()
    labels[:, :4] = -100
    expected = nn.functional.cross_entropy(logits(model, ids())[:, 3:-1].flatten(0, 1), labels[:, 4:].flatten())
    assert_close(loaded(ids(), labels=labels).loss, expected)
    loss = loaded.train()(ids(), labels=labels).loss
    aux = sum(loaded.transformer(ids()).aux_losses.values())
    assert aux > 0
    assert_close(loss, expected + aux)
    loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_padding_on_either_side_changes_no_real_position(loaded: Any) -> None:
    real = ids(1, 5)
    pad = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        expected = loaded(real).logits
        for parts, kept in (((pad, real), slice(3, None)), ((real, pad), slice(0, 5))):
            mask = torch.cat([(part != 0).long() for part in parts], 1)
            assert_close(loaded(torch.cat(parts, 1), attention_mask=mask).logits[:, kept], expected)


def test_a_table_learns_by_any_optimizer(loaded: Any) -> None:
    model = AutoModelForCausalLM.from_config(loaded.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert not torch.equal(model.state_dict()["transformer.tables.0.weight"], before["transformer.tables.0.weight"])


@pytest.mark.parametrize("canonical", [False, True])
def test_a_new_model_has_the_end_token_of_the_configuration(
    canonical: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = export(tmp_path, "ffn=engram", changes={**CHANGES["engram"], "canonical": canonical})
    configured = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(configured)
    assert configured.eos_token_id > 0
    # As `init_weights` draws it.
    assert float(model.transformer.embedding.weight.detach().std()) == pytest.approx(16**-0.5, rel=0.1)
    assert [
        int(plugin.addressing.end_id) for _, _, plugin in model.transformer.plugins() if hasattr(plugin, "conv")
    ] == [configured.eos_token_id]
    assert ("a configuration alone: ffn.canonical=true needs the texts" in caplog.text) is canonical
    configured.eos_token_id = None
    AutoModelForCausalLM.from_config(configured)


def test_reduced_precision(folder: Path, loaded: Any) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        difference = half(ids()).logits.float() - loaded(ids()).logits
        assert difference.norm() < 0.05 * loaded(ids()).logits.norm()
    check_generation(half)


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens_can_be_added(tied: bool, tmp_path: Path) -> None:
    _, folder = export(tmp_path, "ffn=memory", f"model.tied={str(tied).lower()}")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.resize_token_embeddings(VOCAB + 3)
    loaded.save_pretrained(tmp_path / "more")
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    with torch.no_grad():
        assert torch.equal(more(ids()).logits, loaded(ids()).logits)
    assert more(ids()).logits.shape[-1] == VOCAB + 3 == more.config.vocab_size


def test_tables_that_tokens_address_keep_their_tokens(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path, "ffn=engram", changes=CHANGES["engram"])[1])
    assert loaded.resize_token_embeddings(VOCAB).weight.shape[0] == VOCAB
    with pytest.raises(
        ValueError, match=r"^resize_token_embeddings\(263\): tokens address the tables .* made for 260;"
    ):
        loaded.resize_token_embeddings(VOCAB + 3)


def test_the_file_serves_this_package_as_well(folder: Path, loaded: Any) -> None:
    checkpoint = open_checkpoint(folder / "model.safetensors")
    assert checkpoint.kind == "exported"
    shapes = {f"model.{name}": tuple(v.shape) for name, v in loaded.transformer.state_dict().items()}
    checkpoint.check_weights(shapes)


def test_a_plugin_of_the_users_own_needs_trust_and_its_module(tmp_path: Path) -> None:
    target = f"{Causal.__module__}.Causal"
    model, folder = export(tmp_path, "ffn=custom", f"ffn._target_={target}")
    with pytest.raises(ConfigError, match=rf"ffn._target_={target}.*from_pretrained\(folder, trust_config=True\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_config=True)
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, logits(model, ids()))
    # It does not state that it reads one token alone, so the whole sequence is read again for each token.
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = ids()
    for _ in range(4):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(loaded.generate(ids(), **options), expected)
    assert loaded.generate(ids(), num_beams=2, **options).shape == (2, 13)
    with pytest.raises(ValueError, match="neither position_wise"):
        loaded(ids(), cache=object())

    content = json.loads((folder / "config.json").read_text())
    content["transformer"]["ffn"]["_target_"] = "no_such_module.Mine"
    (folder / "config.json").write_text(json.dumps({**content, "trust_config": True}))
    with pytest.raises(ConfigError, match="trust_config=True"):  # a folder cannot declare itself trusted
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"no_such_module\.Mine cannot be imported"):
        AutoModelForCausalLM.from_pretrained(folder, trust_config=True)


def test_refusals(folder: Path, loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        loaded(ids(), attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"must cover the 4 cached tokens and the 1 new ones: \(2, 5\)"):
        loaded(ids(2, 1), attention_mask=torch.ones(2, 1), cache=loaded(ids(2, 4), use_cache=True).cache)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        loaded.generate(ids(), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        loaded.activation_checkpointing_enable()
    content = json.loads((folder / "config.json").read_text())
    deeper = {**content["transformer"], "model": {**content["transformer"]["model"], "n_layers": 3}}
    for changed, error, reason in (
        ({"transformer": {"model": {}}}, ValueError, "lacks the group ffn"),
        ({"transformer": ["model"]}, ValueError, "lacks the group model"),
        ({"transformer": deeper}, CheckpointError, "the folder lacks"),
        ({"transformer": None}, CheckpointError, "transformer is missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**content, **changed}))
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        with pytest.raises(error, match=reason):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")  # not even opened
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
