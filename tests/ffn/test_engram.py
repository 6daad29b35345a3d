"""Engram against its formulas written out per token; documents, padding, tokenizers, start and refusals.

Letters: S streams.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory.plain_ngrams import plain_ids
from tolerances import assert_close, assert_same_gradients
from torch import Tensor
from toys import Letters

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import Engram, FFNContext
from pkm_lightning.memory import ValueTable

SIZES: dict[str, Any] = {
    "dim": 12,
    "n_layers": 2,
    "vocab_size": 50,
    "table_number": 0,
    "orders": [2, 3],
    "heads": 2,
    "rows": 30,
    "row_dim": 3,
    "kernel": 3,
    "dilation": None,
    "canonical": False,
    "gate": "sigmoid",
    "streams": 1,
    "seed": 7,
    "row_multiple": 8,
    "norm_eps": 1e-6,
    "end_id": None,
}
DOCS_BT = torch.tensor([[0] * 4 + [1] * 7, [2] * 1 + [3] * 5 + [4] * 5])


def engram(**changes: Any) -> Engram:
    """Builds a layer with a table of its own, whose parameters are all drawn at random."""
    sizes = {**SIZES, **changes}
    spec = Engram.table_spec(**sizes)
    plugin = Engram(table=sizes.pop("table", ValueTable(rows=spec.rows, dim=spec.dim)), **sizes)
    for parameter in plugin.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return plugin


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    """Draws tokens of which a quarter are the end token 0."""
    ids_BT = torch.randint(50, (batch, length))
    return torch.where(torch.rand(batch, length) < 0.25, 0, ids_BT)


def normalised(x_BTD: Tensor, weight_D: Tensor, streams: int) -> Tensor:
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in x_BTD.chunk(streams, -1)]
    return torch.cat(parts, -1) * (1 + weight_D)


def written_out(plugin: Engram, x_BTD: Tensor, context: FFNContext, table: ValueTable) -> Tensor:
    """Computes the layer by the formulas of its docstring, its lookup and convolution token by token."""
    B, T, D = x_BTD.shape
    S, C = plugin.streams, D // plugin.streams
    valid_BT = torch.ones(B, T, dtype=torch.bool) if context.valid_BT is None else context.valid_BT
    docs_BT = torch.zeros(B, T, dtype=torch.int64) if context.doc_ids_BT is None else context.doc_ids_BT
    ids = [
        plain_ids(plugin.addressing, one.where(valid, -1).tolist(), docs.tolist())
        for one, valid, docs in zip(context.input_ids_BT, valid_BT, docs_BT, strict=True)
    ]
    e_BTX = torch.stack([torch.stack([table.weight[rows].flatten() for rows in sequence]) for sequence in ids])
    value_BTC = e_BTX @ plugin.value.weight.T
    parts = []
    for stream in range(S):
        part = slice(stream * C, (stream + 1) * C)
        alpha_BT1 = torch.ones(B, T, 1)
        if plugin.key is not None:
            key_BTC = normalised(e_BTX @ plugin.key.weight[part].T, plugin.key_norm.weight[part], 1)
            query_BTC = normalised(x_BTD[..., part], plugin.query_norm.weight[part], 1)
            s_BT1 = (key_BTC * query_BTC).sum(-1, keepdim=True) / C**0.5
            if plugin.takes_root:
                s_BT1 = s_BT1.sign() * s_BT1.abs().clamp(min=1e-6).sqrt()
            alpha_BT1 = torch.sigmoid(s_BT1)
        parts.append(alpha_BT1 * value_BTC)
    v_BTD = torch.cat(parts, -1)
    normed_BTD = normalised(v_BTD, plugin.conv_norm.weight, S) * valid_BT.unsqueeze(-1)
    taps, dilation = plugin.conv.kernel_size[0], plugin.conv.dilation[0]
    rows = []
    for b in range(B):
        for t in range(T):
            sources = [(tap, t - (taps - 1 - tap) * dilation) for tap in range(taps)]
            seen = [
                plugin.conv.weight[:, 0, tap] * normed_BTD[b, s]
                for tap, s in sources
                if s >= 0 and docs_BT[b, s] == docs_BT[b, t]
            ]
            rows.append(torch.stack(seen).sum(0))
    c_BTD = torch.stack(rows).view(B, T, D)
    return v_BTD + c_BTD * torch.sigmoid(c_BTD)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streams": 3},
        {"gate": "none", "kernel": 1},
        {"gate": "no_root", "orders": [4, 2], "heads": 1, "dilation": 2},
    ],
    ids=str,
)
def test_output_and_gradients(changes: dict[str, Any], documents: bool, padded: bool) -> None:
    plugin = engram(**changes).double()
    table = plugin.reads()[0].table.double()
    valid_BT = torch.ones(2, 11, dtype=torch.bool)
    valid_BT[0, :3] = valid_BT[1, 7:] = False
    context = FFNContext(tokens(), valid_BT if padded else None, DOCS_BT if documents else None)
    x_BTD = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    # The outputs of padding are nobody's input.
    real_BT = valid_BT if padded else torch.ones_like(valid_BT)
    y_TD = plugin(x_BTD, context).y_BTD[real_BT]
    expected_TD = written_out(plugin, x_BTD, context, table)[real_BT]
    assert_close(y_TD, expected_TD)
    inputs = {"x": x_BTD, "table": table.weight, **dict(plugin.named_parameters())}
    if plugin.key is None:
        inputs.pop("x")
    assert_same_gradients(y_TD, expected_TD, inputs)


def test_packed_documents_are_read_as_if_alone() -> None:
    plugin, ids_BT, x_BTD = engram(), tokens(1, 12), torch.randn(1, 12, 12)
    doc_ids_BT = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4])
    packed_BTD = plugin(x_BTD, FFNContext(ids_BT, doc_ids_BT=doc_ids_BT)).y_BTD
    for part in (slice(0, 5), slice(5, 8), slice(8, 12)):
        assert_close(packed_BTD[:, part], plugin(x_BTD[:, part], FFNContext(ids_BT[:, part])).y_BTD)
    # Without numbers of documents, an end token separates n-grams but not the convolution.
    ids_BT[0, 4] = 0
    assert torch.equal(
        plugin.row_ids(FFNContext(ids_BT))[0][1][5:8],
        plugin.row_ids(FFNContext(ids_BT[:, 5:8]))[0][1],
    )


def test_the_start_adds_a_small_share_and_only_the_convolution_is_silent() -> None:
    plugin = engram(dim=64, row_dim=16, rows=1000)
    table = plugin.reads()[0].table
    plugin.reset_parameters()
    torch.nn.init.normal_(table.weight, std=Engram.table_spec(**{**SIZES, "dim": 64, "row_dim": 16}).std)
    x_BTD = torch.randn(4, 50, 64) / 8  # as of an embedding
    y_BTD = plugin(x_BTD, FFNContext(torch.randint(50, (4, 50)))).y_BTD
    assert 0.1 < y_BTD.norm() / x_BTD.norm() < 0.4
    y_BTD.square().sum().backward()
    silent = {name for name, parameter in plugin.named_parameters() if not parameter.grad.any()}
    assert silent == {"conv_norm.weight"}
    assert table.weight.grad.any()


def test_row_ids_are_the_rows_that_are_read_and_the_trace_weighs_them_by_the_gate() -> None:
    plugin, x_BTD = engram(streams=3), torch.randn(2, 11, 12)
    context = FFNContext(tokens(), doc_ids_BT=DOCS_BT, observe=True)
    output = plugin(x_BTD, context)
    ((table, ids_TK),) = plugin.row_ids(context)
    assert table is plugin.slots()[0].tables[0]
    assert torch.equal(output.trace["slot_ids"].flatten(0, 1), ids_TK)
    output.y_BTD.sum().backward()
    assert set(table.weight.grad.any(1).nonzero().flatten().tolist()) == set(ids_TK.flatten().tolist())
    weights_BTK = output.trace["slot_weights"]
    assert torch.equal(weights_BTK, weights_BTK[..., :1].expand(2, 11, 4))
    figures = plugin.diagnostics(output, x_BTD, context)
    assert_close(figures["memory_gate"], weights_BTK.mean())
    assert_close(figures["memory_share"], (output.y_BTD.norm(dim=-1) / x_BTD.norm(dim=-1)).mean())


def test_diagnostics_leave_out_padding() -> None:
    plugin, x_BTD, ids_BT = engram(), torch.randn(1, 9, 12), tokens(1, 9)
    valid_BT = torch.arange(9).unsqueeze(0) < 6
    padded, short = FFNContext(ids_BT, valid_BT), FFNContext(ids_BT[:, :6])
    figures = plugin.diagnostics(plugin(x_BTD, padded), x_BTD, padded)
    expected = plugin.diagnostics(plugin(x_BTD[:, :6], short), x_BTD[:, :6], short)
    for name, value in figures.items():
        assert_close(value, expected[name])


class Folding(Letters):
    """A tokenizer whose end token is another one, and that knows fewer tokens than the model."""

    eos_id, vocab_size = 3, 48


def test_the_tokenizer_gives_end_token_and_canonical_tokens() -> None:
    plugin = engram(canonical=True)
    plugin.bind_tokenizer(Folding())
    assert int(plugin.addressing.end_id) == 3
    canonical = plugin.addressing.canonical_ids.tolist()
    first = {letter: i + 1 for i, letter in reversed(list(enumerate(Letters.alphabet)))}
    folded = [i if i in (0, 48, 49) else first[Letters.alphabet[i - 1].lower()] for i in range(50)]
    assert canonical == folded
    assert folded != list(range(50))
    copied = engram(canonical=True)
    copied.load_state_dict(plugin.state_dict())
    context = FFNContext(tokens())
    assert torch.equal(copied.row_ids(context)[0][1], plugin.row_ids(context)[0][1])
    plain = engram()
    plain.bind_tokenizer(Folding())
    assert plain.addressing.canonical_ids.tolist() == list(range(50))
    fixed = engram(end_id=7)
    fixed.bind_tokenizer(None)
    assert int(fixed.addressing.end_id) == 7


class Endless(Letters):
    eos_id = None  # type: ignore[assignment]


class Beyond(Letters):
    eos_id = 50


@pytest.mark.parametrize(
    ("changes", "tokenizer", "message"),
    [
        ({}, Endless(), r"^ffn.end_id=null takes the end-of-text token of the data's tokenizer, which has none .*\.$"),
        ({}, None, r"^ffn.end_id=null takes the end-of-text token of the data's tokenizer, .* set ffn.end_id"),
        ({}, Beyond(), r"^the tokenizer's eos_id=50 is out of range; allowed: 0 to 49.$"),
        ({"end_id": 1, "canonical": True}, None, r"^ffn.canonical=true needs the texts of a tokenizer"),
    ],
)
def test_tokenizers_without_what_is_needed_are_refused(changes: dict[str, Any], tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engram(**changes).bind_tokenizer(tokenizer)


def test_rows_that_fill_up_the_table_are_no_slots() -> None:
    plugin = engram(table_number=0, row_multiple=64)
    (slots,) = plugin.slots()
    sizes_K = plugin.addressing.head_sizes
    assert (slots.count, slots.padding) == (int(sizes_K.sum()), -int(sizes_K.sum()) % 64)
    assert slots.padding
    sizes_K += 1  # as weights from files may have it
    assert plugin.slots()[0].count == slots.count + 1
    assert plugin.to("meta").slots() == [slots]


def test_tables_of_several_layers_have_other_primes_and_other_hashes() -> None:
    first, second = (engram(table_number=number, row_multiple=1) for number in (0, 1))
    sizes = [plugin.addressing.head_sizes.tolist() for plugin in (first, second)]
    assert not set(sizes[0]) & set(sizes[1])
    assert [plugin.slots()[0].count for plugin in (first, second)] == [sum(one) for one in sizes]
    assert not set(first.addressing.multipliers.tolist()) & set(second.addressing.multipliers.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": [1, 2]}, r"^ffn.orders=\[1, 2\]: order=1 is out of range; allowed: 2 to 64.$"),
        ({"orders": [2, 100_000]}, r"^ffn.orders=\[2, 100000\]: order=100000 is out of range; allowed: 2 to 64.$"),
        ({"orders": [3, 3]}, r"^ffn.orders=\[3, 3\] must list"),
        ({"rows": 2}, r"^ffn.rows=2 is too few for the distinct primes of 4 heads"),
        ({"rows": 2**31}, r"^ffn.rows=2147483648 for 4 heads are more than 2,147,483,647 rows"),
        (
            {"row_dim": None, "heads": 5},
            r"^ffn.row_dim=null divides model.dim=12 by 10 reads per token, .* set ffn.row_",
        ),
        ({"row_dim": 0}, r"^ffn.row_dim=0 is out of range"),
        ({"row_multiple": 0}, r"^ffn.row_multiple=0 is out of range"),
        ({"streams": 5}, r"^ffn.streams=5 does not divide model.dim=12; use a divisor.$"),
        ({"streams": 0}, r"^ffn.streams=0 is out of range"),
        ({"kernel": 0}, r"^ffn.kernel=0 is out of range"),
        ({"kernel": 100_000}, r"^ffn.kernel=100000 is out of range; allowed: 1 to 64.$"),
        ({"dilation": 0}, r"^ffn.dilation=0 is out of range"),
        ({"dilation": 10**9}, r"^ffn.dilation=1000000000 is out of range; allowed: 1 to 4096.$"),
        ({"gate": "tanh"}, r"^ffn.gate='tanh' is not known; allowed: sigmoid, no_root, none."),
        ({"canonical": "maybe"}, r"^ffn.canonical='maybe' is neither true nor false"),
        ({"norm_eps": -1.0}, r"^ffn.norm_eps=-1.0 is out of range"),
        ({"end_id": 50}, r"^ffn.end_id=50 is out of range; allowed: 0 to 49.$"),
        ({"table": ValueTable(rows=144, dim=4)}, r"^table has shape \(144, 4\), but ffn.rows=30, .* need \(152, 3\)"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engram(**changes)
