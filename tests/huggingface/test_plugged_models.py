"""Plugins beside the FFNs of models of transformers: what they leave as it is, what learns, what they see and write."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pretrained_models
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from pkm_lightning import PKM, PLE, STEM, ConfigError, Engram, MemoryPlus, replace_ffn
from pkm_lightning.ffn import FFNContext, FFNOutput

IDS = torch.arange(2, 26).view(2, 12)
KEYS = {"n_keys": 9, "knn": 3}
#: Class, mode, options.
PLACES: list[tuple[type[nn.Module], str, dict[str, Any]]] = [
    (MemoryPlus, "parallel", KEYS),
    (Engram, "before", {"rows": 30}),
    (PLE, "after", {}),
]
FAMILIES = pytest.mark.parametrize("name", pretrained_models.NAMES)


def with_plugins(name: str = "llama", **keywords: Any) -> PreTrainedModel:
    """Returns a model with all of `PLACES` in both layers, and weights in which nothing is zero."""
    model = pretrained_models.tiny(name)
    for ffn, mode, options in PLACES:
        replace_ffn(model, layers=[0, 1], ffn=ffn, mode=mode, **options, **keywords)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: nn.Module, ids_BT: Tensor = IDS, **keywords: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids_BT, **keywords).logits
    return out


@FAMILIES
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0].__name__)
def test_nothing_changes_at_first_and_plugins_alone_learn(
    name: str, place: tuple[type[nn.Module], str, dict[str, Any]]
) -> None:
    ffn, mode, options = place
    model = pretrained_models.tiny(name)
    with torch.no_grad():
        before = model(IDS, output_hidden_states=True)
    trunk = {key: value.clone() for key, value in model.state_dict().items()}
    replace_ffn(model, layers=[0, 1], ffn=ffn, mode=mode, freeze_trunk=True, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        after = model(IDS, output_hidden_states=True)
    for expected, hidden_BTD in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(hidden_BTD, expected)
    assert torch.equal(after.logits, before.logits)
    learning = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert not learning.keys() & trunk.keys()
    optimizer = torch.optim.SGD(learning.values(), lr=1.0)
    for _ in range(4):  # the last to learn is the norm in front of Engram's convolution
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(bool(p.grad is not None and p.grad.any()) for p in learning.values())
    learned = model.state_dict()
    for key, value in trunk.items():
        assert torch.equal(learned[key.replace(".mlp.", ".mlp.base.") if mode == "parallel" else key], value), key
    assert not torch.equal(logits(model.eval()), before.logits)


def mask() -> Tensor:
    mask_BT = torch.ones_like(IDS)
    mask_BT[1, :4] = 0
    return mask_BT


@FAMILIES
def test_a_cache_and_padding_change_nothing(name: str) -> None:
    model = with_plugins(name)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    written = model.generate(IDS, attention_mask=mask(), **settings)
    assert torch.equal(written, model.generate(IDS, attention_mask=mask(), use_cache=False, **settings))
    assert torch.equal(written[1:, 4:], model.generate(IDS[1:, 4:], attention_mask=mask()[1:, 4:], **settings))


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_cache_that_is_reordered_or_cropped_changes_nothing(how: dict[str, int]) -> None:
    model = with_plugins()
    rows = slice(None) if "num_beams" in how else slice(1)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = mask()[rows]
    written = model.generate(IDS[rows], **settings, **how)
    expected = {} if "prompt_lookup_num_tokens" in how else how
    assert torch.equal(written, model.generate(IDS[rows], **settings, **expected, use_cache=False))


def test_a_cache_is_filled_in_parts_and_one_of_another_origin_is_refused() -> None:
    model, plain = with_plugins(), pretrained_models.tiny("llama")
    first = model(IDS[:, :5], use_cache=True)
    second = model(IDS[:, 5:], cache=first.cache, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], 1), logits(model))
    cache = plain(IDS[:, :5], use_cache=True).cache
    with pytest.raises(ValueError, match="cache: it holds 5 tokens, and a plugin has seen 0 of them"):
        model(IDS[:, 5:], cache=cache)
    assert torch.equal(logits(model), logits(model))  # a forward that failed leaves nothing behind
    for kept, message in (
        (StaticCache(config=model.config, max_cache_len=20), "a StaticCache has no place for what Engram remembers"),
        (DynamicCache(config=model.config, offloading=True), "a DynamicCache with offloading has no place"),
    ):
        with pytest.raises(ValueError, match=f"cache: {message}.*; leave cache_implementation out, or pass use_cache"):
            model(IDS, cache=kept)
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 7\); .* 12 cached .*: \(2, 19\)"):
        model(IDS[:, 5:], cache=first.cache, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="inputs_embeds: Engram reads rows by token id; pass input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))


class MeanOfAll(nn.Module):
    """A plugin that may read any token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        return FFNOutput(self.scale * x_BTD.mean(1, keepdim=True).expand_as(x_BTD))


def test_a_plugin_that_reads_any_token_refuses_a_cache() -> None:
    model = pretrained_models.tiny("llama")
    replace_ffn(model, layers=[1], ffn=MeanOfAll)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2}
    with pytest.raises(
        ValueError, match="cache: MeanOfAll is neither position_wise nor uses_past; pass use_cache=False"
    ):
        model.generate(IDS, **settings)
    assert model.generate(IDS, **settings, use_cache=False).shape == (2, 14)
    with pytest.raises(ConfigError, match=r"^MeanOfAll has no zero_output\(\), .*, or set zero_start=False"):
        replace_ffn(model, layers=[0], ffn=MeanOfAll, mode="parallel")


def test_padding_enters_no_statistics() -> None:
    model = pretrained_models.tiny("qwen2").train()
    (pkm,) = replace_ffn(model, layers=[1], ffn=PKM, **KEYS)
    seen: list[FFNContext] = []
    pkm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    for mask_BT in (mask(), torch.ones_like(IDS)):
        with pytest.warns(UserWarning, match="^PKM reports losses or statistics"):
            model(IDS, attention_mask=mask_BT)
    assert seen[0].valid_BT is not None
    assert torch.equal(seen[0].valid_BT, mask().bool())
    assert seen[1].valid_BT is None
    assert seen[1].embedding_BTD is not None
    assert torch.equal(seen[1].embedding_BTD, model.get_input_embeddings()(IDS))


def test_copies_are_whole_and_checkpointed_activations_give_the_same_gradients() -> None:
    model = with_plugins().train()
    copied = copy.deepcopy(model)
    copied.activation_checkpointing_enable({"use_reentrant": False})
    for other in (model, copied):
        other(IDS, labels=IDS, use_cache=False).loss.backward()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_close(q.grad, p.grad, kind="grad")
    expected = logits(model.eval())
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "beside"}, r"^mode='beside' is not known; allowed: replace, parallel, before, after"),
        ({"mode": "replace", "zero_start": True}, r"^zero_start=True under mode='replace' leaves the layers without"),
        ({"mode": "after", "zero_start": "no"}, r"^zero_start='no' is neither true nor false"),
        ({"mode": "before", "freeze_trunk": 2}, r"^freeze_trunk=2 is neither true nor false"),
        ({"mode": "before", "norm_eps": 0.0}, r"^ffn.norm_eps=0 normalises"),
        ({"mode": "before", "canonical": True}, r"^ffn.canonical=true needs the texts of a tokenizer"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(keywords: dict[str, Any], message: str) -> None:
    model = pretrained_models.tiny("llama")
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        replace_ffn(model, layers=[1], ffn=Engram, rows=30, **keywords)
    assert list(model.state_dict()) == before
    assert model.config.model_type == "llama"


@pytest.mark.parametrize("mode", ["parallel", "before", "after"])
def test_a_place_has_room_for_one_plugin(mode: Any) -> None:
    model = pretrained_models.tiny("llama")
    replace_ffn(model, layers=[1], ffn=STEM, mode=mode, hidden_dim=8)
    with pytest.raises(ConfigError, match=rf"^layer 1 has a STEM with mode={mode} already; choose another layer, or"):
        replace_ffn(model, layers=[0, 1], ffn=MemoryPlus, mode=mode, **KEYS)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    model = pretrained_models.tiny("llama")
    model.model.layers[1].forward = model.model.layers[1].forward
    with pytest.raises(
        ConfigError, match=r"^layer 1 of this LlamaForCausalLM has a forward of its own, as device_map="
    ):
        replace_ffn(model, layers=[0], ffn=MemoryPlus, **KEYS)
