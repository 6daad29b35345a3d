"""`ffn=ple` against the per-layer embeddings of transformers' Gemma 3n and Gemma 4, by copied weights.

Gemma's other parts (AltUp, Laurel, attention, FFN) run as they are, and what the per-layer part adds is taken from the
output of its decoder layer. Letters: L layers, W vocabulary, S streams of AltUp.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tolerances import assert_close
from torch import Tensor, nn
from toys import config
from transformers.models.gemma3n import modeling_gemma3n as gemma3n
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from pkm_lightning.build.model import build_model
from pkm_lightning.build.stored_tables import fill_first_rows
from pkm_lightning.ffn import PLE, FFNContext
from pkm_lightning.memory import ValueTable

L, W, DIM, VALUES = 3, 37, 24, 5
SIZES: dict[str, Any] = {
    "vocab_size": W, "vocab_size_per_layer_input": W, "hidden_size": DIM, "hidden_size_per_layer_input": VALUES,
    "num_hidden_layers": L, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "layer_types": ["full_attention"] * L, "num_kv_shared_layers": 0, "attn_implementation": "eager",
}  # fmt: skip
FAMILIES = {
    "gemma3n": (gemma3n.Gemma3nTextModel, Gemma3nTextConfig, gemma3n.Gemma3nRMSNorm, {"altup_num_inputs": 2}),
    "gemma4": (gemma4.Gemma4TextModel, Gemma4TextConfig, gemma4.Gemma4RMSNorm, {}),
}


def wide_norm(norm: Any, x: Tensor) -> Tensor:
    """Returns what the norm of Gemma computes, without its casts to fp32."""
    normed: Tensor = norm._norm(x)
    return normed * norm.weight if norm.with_scale else normed


def gemma(family: str, dtype: torch.dtype) -> Any:
    """Builds a Gemma with random gains, whose scales are those of the formula in `dtype`."""
    model_class, config_class, _, sizes = FAMILIES[family]
    model: Any = model_class(config_class(**SIZES, **sizes)).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    # Both are fp32 in the model, and stay so in fp64.
    for module, scale in ((model.embed_tokens, DIM), (model.embed_tokens_per_layer, VALUES)):
        module.embed_scale = torch.tensor(scale, dtype=torch.float64).sqrt().to(dtype)
    if family == "gemma3n":
        model.per_layer_input_scale = torch.tensor(2.0, dtype=torch.float64).rsqrt().to(dtype)
        model.per_layer_projection_scale = torch.tensor(float(DIM), dtype=torch.float64).rsqrt().to(dtype)
        for layer in model.layers:  # the other stream then changes by the same as the first, and by the per-layer part
            for coefficients in (layer.altup.prediction_coefs, layer.altup.correction_coefs):
                nn.init.zeros_(coefficients.weight)
    return model


def added(model: Any, number: int, p_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """Runs decoder layer `number` on a random stream; returns the input of its per-layer part and what that adds."""
    layer, dtype = model.layers[number], p_BTV.dtype
    gate_inputs: list[Tensor] = []
    hook = layer.per_layer_input_gate.register_forward_pre_hook(lambda _, inputs: gate_inputs.append(inputs[0]))
    positions = model.rotary_emb(p_BTV, torch.arange(p_BTV.shape[1])[None], "full_attention")
    has_streams = hasattr(layer, "altup")
    x = torch.randn(*([2] if has_streams else []), *p_BTV.shape[:2], DIM, dtype=dtype, requires_grad=True)
    out = layer(x, per_layer_input=p_BTV, position_embeddings=positions, shared_kv_states={})
    hook.remove()
    if has_streams:
        return gate_inputs[0], (out[1] - x[1]) - (out[0] - x[0])
    return gate_inputs[0], out / layer.layer_scalar - gate_inputs[0]


def copied(model: Any) -> tuple[list[PLE], ValueTable]:
    dtype = model.embed_tokens.weight.dtype
    table = ValueTable(rows=W, dim=L * VALUES, slices=L).to(dtype)
    sizes: dict[str, Any] = {"dim": DIM, "n_layers": L, "vocab_size": W, "value_dim": VALUES, "norm_eps": 1e-6}
    layers = [
        PLE(**sizes, table=table, table_reader=n, context=True, activation="gelu_tanh").to(dtype) for n in range(L)
    ]
    with torch.no_grad():
        table.weight.copy_(model.embed_tokens_per_layer.weight.view(W * L, VALUES))
        for ours, theirs, projection_VD in zip(
            layers, model.layers, model.per_layer_model_projection.weight.split(VALUES), strict=True
        ):
            assert ours.projection is not None
            assert ours.projection_norm is not None
            ours.projection.weight.copy_(projection_VD)
            ours.projection_norm.weight.copy_(model.per_layer_projection_norm.weight)
            ours.gate.weight.copy_(theirs.per_layer_input_gate.weight)
            ours.up.weight.copy_(theirs.per_layer_projection.weight)
            ours.norm.weight.copy_(theirs.post_per_layer_input_norm.weight)
    return layers, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_all_gradients_are_those_of_gemma(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares with Gemma as it is in fp32, and without the casts of its norms in fp64."""
    if dtype is torch.float64:
        monkeypatch.setattr(FAMILIES[family][2], "forward", wide_norm)
    model = gemma(family, dtype)
    layers, table = copied(model)
    # Gemma keeps the row of the padding token, 0, from learning.
    ids_BT = torch.randint(1, W, (2, 7))
    embedding_BTD = model.embed_tokens(ids_BT)
    extra = (embedding_BTD,) if family == "gemma4" else ()
    p_BTLV = model.project_per_layer_inputs(embedding_BTD, model.get_per_layer_inputs(ids_BT, *extra))
    ours, theirs, losses = [], [], torch.zeros(2, dtype=dtype)
    embedding = model.embed_tokens.weight.detach().clone().requires_grad_(True)
    context = FFNContext(ids_BT, embedding_BTD=embedding[ids_BT])
    for number, layer in enumerate(layers):
        stream_BTD, expected_BTD = added(model, number, p_BTLV[:, :, number])
        x_BTD = stream_BTD.detach().clone().requires_grad_(True)
        y_BTD = layer(x_BTD, context).y_BTD
        assert_close(y_BTD, expected_BTD)
        upstream_BTD = torch.randn_like(y_BTD)
        losses = losses + torch.stack([(y * upstream_BTD).sum() for y in (y_BTD, expected_BTD)])
        part = model.layers[number]
        assert layer.projection is not None
        ours += [x_BTD, layer.gate.weight, layer.up.weight, layer.norm.weight]
        theirs += [stream_BTD, part.per_layer_input_gate.weight, part.per_layer_projection.weight]
        theirs += [part.post_per_layer_input_norm.weight]
    gains = [layer.projection_norm.weight for layer in layers if layer.projection_norm is not None]
    projections = [layer.projection.weight for layer in layers if layer.projection is not None]
    shared = [
        model.embed_tokens_per_layer.weight, model.per_layer_model_projection.weight,
        model.per_layer_projection_norm.weight, model.embed_tokens.weight,
    ]  # fmt: skip
    table_grad, embedding_grad, *grads = torch.autograd.grad(
        losses[0], [table.weight, embedding, *gains, *projections, *ours], retain_graph=True
    )
    expected = torch.autograd.grad(losses[1], [*shared, *theirs])
    ours_in_theirs = [
        table_grad.view(W, -1),
        torch.cat(grads[L : 2 * L]),
        sum(grads[:L]),
        embedding_grad,
        *grads[2 * L :],
    ]
    for grad, expected_grad in itertools.zip_longest(ours_in_theirs, expected):
        assert expected_grad.any()
        assert_close(grad, expected_grad, kind="grad")


@pytest.mark.parametrize("trainable", [True, False])
def test_the_table_in_a_file_of_gemma_is_the_table_of_the_layers(trainable: bool, tmp_path: Path) -> None:
    """Gemma stores the rows of all layers as one matrix, (W, L * V)."""
    rows_WE = torch.randn(50, L * VALUES)
    save_file({"model.embed_tokens_per_layer.weight": rows_WE}, tmp_path / "model.safetensors")
    overrides = ["ffn=ple", f"ffn.value_dim={VALUES}", f"table.path={tmp_path}/model.safetensors"]
    model = build_model(
        config(*overrides, f"table.trainable={trainable}", *([] if trainable else ["table.device=mmap"]))
    )
    model.init_weights(1)
    fill_first_rows(model)
    ids_BT = torch.randint(50, (2, 7))
    for number, block in enumerate(model.blocks):
        assert isinstance(block.after, PLE)
        assert torch.equal(block.after.read(FFNContext(ids_BT)), rows_WE.view(50, L, VALUES)[ids_BT, number])
