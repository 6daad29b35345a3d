"""Engram equals the PLE layer of Qwen's n-gram models in transformers, by copied weights, to 1e-6 in fp64.

That layer normalises in fp32: here its casts keep fp64, so that its own formulas are compared without their rounding.

Letters: W vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pkm_lightning.ffn import Engram, FFNContext
from pkm_lightning.memory import ValueTable

END, W, DIM, RELATIVE = 3, 61, 8, 1e-6
#: A prime, which is then the first of the primes.
ROWS_PER_HEAD = 41
#: Our names of the weights.
NAMES = {
    "key.weight": "key_proj.weight",
    "value.weight": "value_proj.weight",
    "key_norm.weight": "norm_key.weight",
    "query_norm.weight": "norm_query.weight",
    "conv_norm.weight": "norm_conv.weight",
    "conv.weight": "conv1d.weight",
    "addressing.multipliers": "ple_embedding.layer_multipliers",
    "addressing.head_sizes": "ple_embedding.ngram_heads_vocab_sizes",
    "addressing.head_offsets": "ple_embedding.ngram_heads_offsets",
}
ROWS = "ple_embedding.ngram_embedding.weight"


@pytest.fixture(autouse=True)
def casts_keep_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda x: x)


def foreign(streams: int, order: int, number: int) -> tuple[nn.Module, Any]:
    """Builds layer `number` of those with a table, of `streams` streams, and its configuration."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    sizes = {"num_hidden_layers": 4, "hidden_size": DIM, "vocab_size": W, "eos_token_id": END}
    ngrams = {
        "ple_embed_dim": 6 * (order - 1),
        "ngram_size": order,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": ROWS_PER_HEAD,
    }
    types = ["linear_attention"] * 4
    config = Qwen4ExpTextConfig(**sizes, **ngrams, ple_layer_ids=[1, 2], layer_types=types, seed=5)
    # Set afterwards, since the configuration refuses one stream, which the layer can have.
    config.hc_count = streams
    layer = Qwen4ExpTextPLELayer(config, layer_idx=number, ple_layer_index=number)
    return layer.double(), config


def pair(streams: int, order: int = 3, number: int = 0) -> tuple[nn.Module, Engram, Any]:
    """Returns the layer of transformers with random weights, ours with the same, and the configuration."""
    layer, config = foreign(streams, order, number)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    sizes: dict[str, Any] = {
        "dim": DIM * streams,
        "table_number": number,
        "orders": list(range(2, order + 1)),
        "heads": 2,
        "rows": ROWS_PER_HEAD,
        "row_dim": 3,
        "row_multiple": config.make_ngram_vocab_size_divisible_by,
    }
    spec = Engram.table_spec(**sizes)
    plugin = Engram(
        **sizes,
        table=ValueTable(rows=spec.rows, dim=spec.dim),
        n_layers=4,
        vocab_size=W,
        kernel=config.ple_conv_kernel_size,
        dilation=None,
        canonical=False,
        gate="sigmoid",
        streams=streams,
        seed=config.seed,
        norm_eps=config.rms_norm_eps,
        end_id=END,
    ).double()
    state = layer.state_dict()
    own = plugin.state_dict()
    for name in ("multipliers", "head_sizes", "head_offsets"):
        assert torch.equal(own[f"addressing.{name}"], state[NAMES[f"addressing.{name}"]]), name
    plugin.load_state_dict({**own, **{name: state[theirs] for name, theirs in NAMES.items()}})
    table_of(plugin).double().load_state_dict({"weight": state[ROWS]})
    return layer, plugin, config


def table_of(plugin: Engram) -> ValueTable:
    return plugin.slots()[0].tables[0]


def batch(streams: int, length: int = 23) -> tuple[Tensor, Tensor]:
    """Draws tokens, of which a fifth are end tokens, and hidden states, of which two agree with nothing."""
    ids_BT = torch.randint(W, (3, length))
    x_BTD = torch.randn(3, length, DIM * streams, dtype=torch.float64)
    # Below the smallest agreement that the root in the gate sees.
    x_BTD[:, 3:5] *= 1e-10
    return torch.where(torch.rand(3, length) < 0.2, END, ids_BT), x_BTD.requires_grad_()


def check(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert expected.dtype is torch.float64
    assert float((actual.detach() - expected.detach()).norm() / expected.detach().norm()) < RELATIVE, what


@pytest.mark.parametrize(("streams", "order", "number"), [(1, 3, 0), (4, 3, 1), (2, 4, 1), (1, 2, 0)])
def test_outputs_and_gradients_of_every_weight_and_row(streams: int, order: int, number: int) -> None:
    layer, plugin, _ = pair(streams, order, number)
    ids_BT, x_BTD = batch(streams)
    expected_BTD = layer(x_BTD, ids_BT, None)
    y_BTD = plugin(x_BTD, FFNContext(ids_BT)).y_BTD
    check(y_BTD, expected_BTD)
    upstream_BTD = torch.randn_like(y_BTD)
    theirs = dict(layer.named_parameters())
    ours = {NAMES[name]: parameter for name, parameter in plugin.named_parameters() if not name.startswith("reference")}
    ours[ROWS] = table_of(plugin).weight
    assert ours.keys() == theirs.keys()
    grads = torch.autograd.grad(y_BTD, [x_BTD, *ours.values()], upstream_BTD)
    expected = torch.autograd.grad(expected_BTD, [x_BTD, *(theirs[name] for name in ours)], upstream_BTD)
    for name, grad, expected_grad in zip(["x", *ours], grads, expected, strict=True):
        check(grad, expected_grad, name)
    assert torch.equal(grads[-1].any(1), expected[-1].any(1)), "the same rows have a gradient"


@pytest.mark.parametrize("streams", [1, 2])
def test_padding_on_the_left(streams: int) -> None:
    layer, plugin, _ = pair(streams)
    ids_BT, x_BTD = batch(streams)
    valid_BT = torch.arange(23) >= torch.tensor([[0], [4], [11]])
    expected_BTD = layer(x_BTD, ids_BT.where(valid_BT, END), None, conv_mask=valid_BT)
    check(plugin(x_BTD, FFNContext(ids_BT, valid_BT)).y_BTD[valid_BT], expected_BTD[valid_BT])


def test_documents_equal_the_layer_on_each_alone() -> None:
    layer, plugin, _ = pair(2)
    ids_BT, x_BTD = batch(2)
    doc_ids_BT = torch.tensor([0] * 9 + [1] * 2 + [2] * 12).expand(3, -1)
    packed_BTD = plugin(x_BTD, FFNContext(ids_BT, doc_ids_BT=doc_ids_BT)).y_BTD
    for part in (slice(0, 9), slice(9, 11), slice(11, 23)):
        check(packed_BTD[:, part], layer(x_BTD[:, part], ids_BT[:, part], None))


class Remembered:
    """What a layer has read so far, by name, whole."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def extend(self, name: str, new_BTX: Tensor, before: int, fill: float) -> Tensor:
        front = new_BTX.new_full((len(new_BTX), before, *new_BTX.shape[2:]), fill)
        whole = torch.cat([self.tensors.get(name, front), new_BTX], 1)
        self.tensors[name] = whole
        return whole[:, whole.shape[1] - new_BTX.shape[1] - before :]


@pytest.mark.parametrize("streams", [1, 2])
def test_caches_step_by_step(streams: int) -> None:
    from transformers import DynamicCache

    layer, plugin, config = pair(streams)
    ids_BT, x_BTD = batch(streams)
    cache, past = DynamicCache(config=config), Remembered()
    whole_BTD = layer(x_BTD, ids_BT, None)
    # A prompt, which is shorter than the reach of the convolution, then single tokens and a few at once.
    limits = [0, 5, *range(6, 17), 19, 23]
    for start, end in itertools.pairwise(limits):
        part = slice(start, end)
        expected_BTD = layer(x_BTD[:, part], ids_BT[:, part], cache)
        y_BTD = plugin(x_BTD[:, part], FFNContext(ids_BT[:, part], past=past)).y_BTD
        check(y_BTD, expected_BTD, f"tokens {start} to {end}")
        check(y_BTD, whole_BTD[:, part], f"tokens {start} to {end}")
