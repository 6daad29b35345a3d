"""Plugins beside pretrained FFNs are initialised for the stream of their layer: `match_stream` and its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from small import resolved
from tolerances import assert_close
from torch import Tensor

import pkm_lightning
from pkm_lightning import Engram, MemoryPlus, replace_ffn
from pkm_lightning.build.stream_scale import Place, match_streams
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, HasStreamScale
from pkm_lightning.training.module import LanguageModule

KEYS = {"n_keys": 6, "heads": 3, "knn": 5, "key_dim": 10}
TOKENS = {"vocab_size": 50}
RMS, LENGTH = 0.25, 64.0
#: Class, options, the factor of the input that it undoes, and that of the output.
MATCHED: list[tuple[str, dict[str, Any], float, float]] = [
    ("Dense", {"hidden_dim": 23}, RMS, 1),
    ("Dense", {"hidden_dim": 23, "activation": "gelu"}, RMS, 1),
    ("Engram", {**TOKENS, "rows": 30}, RMS, LENGTH),
    ("ExpertChoiceMoE", {"n_experts": 4, "dense_hidden_dim": 23}, RMS, 1),
    ("Memory", KEYS, RMS, 1),
    ("Memory", {**KEYS, "cures": {"simvq": True}}, RMS, LENGTH),
    ("MemoryPlus", KEYS, RMS, LENGTH),
    ("MemoryPlus", {**KEYS, "gate": "sigmoid", "qk_norm": False}, RMS, LENGTH),
    ("MemoryPlus", {**KEYS, "gate": "none", "value_projection": True}, RMS, LENGTH),
    ("MoE", {"n_experts": 4, "dense_hidden_dim": 23, "top_k": 2, "shared_experts": 1}, RMS, 1),
    ("PKM", {**KEYS, "query_norm": "none"}, RMS, 1),
    ("STEM", {**TOKENS, "hidden_dim": 23}, RMS, LENGTH),
    ("UltraMem", {**KEYS, "value_dim": 6, "spectrum_margin": 0}, RMS, LENGTH),
    ("UltraMemV2", {**KEYS, "value_dim": 5}, RMS, LENGTH),
]


def _name(value: object) -> str:
    return str(value) if isinstance(value, str) else ""


@torch.no_grad()
@pytest.mark.parametrize(("name", "options", "rms", "length"), MATCHED, ids=_name)
def test_a_matched_plugin_does_for_its_stream_what_it_did_for_one_of_length_1(
    name: str, options: dict[str, Any], rms: float, length: float
) -> None:
    plugin: Any = getattr(pkm_lightning, name)(dim=16, **options).eval()
    x_BTD, context = torch.randn(2, 7, 16), FFNContext(torch.randint(50, (2, 7)))
    expected_BTD = plugin(x_BTD, context).y_BTD
    assert isinstance(plugin, HasStreamScale)
    plugin.match_stream(input_rms=RMS, stream_length=LENGTH)
    assert_close(plugin(rms * x_BTD, context).y_BTD / length, expected_BTD)


def _stretched(folder: Path | None = None) -> Any:
    """Returns a pretrained model whose stream is long, and whose norms leave little of it; saved into `folder`."""
    model = pretrained_models.tiny("llama_tied")
    with torch.no_grad():
        model.get_input_embeddings().weight *= 300
        model.get_input_embeddings().weight[::10] *= 1000  # few tokens, with far longer streams
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(0.1)
    if folder is not None:
        pretrained_models.save("llama_tied", folder)  # with its tokenizer
        model.save_pretrained(folder)
    return model


def _nearest_power(values: Tensor) -> float:
    return float(2.0 ** round(math.log2(values.median().item())))


def _factor(matched: Any, drawn: Any) -> float:
    """Returns how much larger the weights of a matrix are than those of another draw, as a power of two."""
    return _nearest_power(matched.weight.std() / drawn.weight.std())


def _measured(model: Any, layer: int) -> tuple[float, float]:
    """Returns the scales of a layer's stream and of its FFN's input, from other random tokens."""
    inputs: list[Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        hidden = model(torch.randint(260, (8, 16)), output_hidden_states=True).hidden_states
    hook.remove()
    return _nearest_power(hidden[layer].norm(dim=-1)), _nearest_power(inputs[0].square().mean(-1).sqrt())


def test_replace_ffn_matches_plugins_that_start_at_zero() -> None:
    model = _stretched().train()
    stream, rms = _measured(model, 1)
    assert stream > 100
    assert rms < 0.2
    torch.manual_seed(3)
    drawn: list[Any] = [MemoryPlus(dim=24, n_keys=6), Engram(dim=24, n_layers=2, vocab_size=260, rows=30, end_id=1)]
    before = model(torch.arange(12)[None]).logits
    modes: list[bool] = []
    hook = model.model.norm.register_forward_pre_hook(lambda norm, _: modes.append(norm.training))
    torch.manual_seed(3)
    (memory,) = replace_ffn(model, layers=[1], ffn=MemoryPlus, mode="parallel", n_keys=6)
    hook.remove()
    assert modes == [False]
    (engram,) = replace_ffn(model, layers=[1], ffn=Engram, mode="before", rows=30)
    assert all(module.training for module in model.modules())
    assert torch.equal(model(torch.arange(12)[None]).logits, before)
    assert _factor(memory.out, drawn[0].out) == stream
    assert _factor(memory.gate, drawn[0].gate) == 1 / rms
    assert _factor(engram.value, drawn[1].value) == stream
    assert _factor(engram.key, drawn[1].key) == 1
    state = torch.get_rng_state()
    match_streams(model, model.get_input_embeddings(), [Place(drawn[1], model.model.layers[1], None)])
    assert torch.equal(torch.get_rng_state(), state)
    (unmatched,) = replace_ffn(_stretched(), layers=[1], ffn=MemoryPlus, mode="replace", n_keys=6)
    assert _factor(unmatched.out, drawn[0].out) == 1


def test_a_model_that_cannot_run_is_an_error_of_replace_ffn() -> None:
    model = _stretched()
    model.model.norm.forward = lambda *_: 1 / 0
    with pytest.raises(ConfigError, match=r"^replace_ffn runs a few tokens .*ZeroDivisionError.*can run first\.$"):
        replace_ffn(model, layers=[0], ffn=MemoryPlus, mode="parallel", n_keys=6)
    del model.model.norm.forward
    replace_ffn(model, layers=[0], ffn=MemoryPlus, mode="parallel", n_keys=6)  # nothing was placed
    with torch.device("meta"):
        meta = type(model)(model.config)
        replace_ffn(meta, layers=[0], ffn=MemoryPlus, mode="parallel", n_keys=6)


def test_a_faulty_match_stream_is_named() -> None:
    class Faulty(MemoryPlus):
        def match_stream(self, *, input_rms: float, stream_length: float) -> None:
            raise RuntimeError(f"{input_rms} {stream_length}")

    with pytest.raises(ConfigError, match=r"^Faulty\.match_stream raised RuntimeError: 0\."):
        replace_ffn(_stretched(), layers=[0], ffn=Faulty, mode="parallel", n_keys=6)


def test_a_fit_matches_once_and_not_where_weights_of_a_checkpoint_follow(tmp_path: Path) -> None:
    stream, rms = _measured(_stretched(tmp_path), 1)
    config = resolved(
        *("model=hf", f"model.path={tmp_path}", "data.seq_len=32", "extra_ffns=memory_plus"),
        *("extra_ffns.memory_plus.placement.layers=[1]", "extra_ffns.memory_plus.ffn={n_keys: 8, knn: 3, key_dim: 8}"),
    ).config
    weights = []
    for follow in (True, False):
        module = LanguageModule(config, weights_follow=follow, gained=["memory_plus"] if follow else [])
        module.configure_model()
        plugin: Any
        ((_, _, plugin),) = module.model.plugins()
        weights.append((plugin.out.weight, plugin.gate.weight))
    (out, gate), (matched_out, matched_gate) = weights
    assert torch.equal(matched_out, out * stream)
    assert torch.equal(matched_gate, gate / rms)
