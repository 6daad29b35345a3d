"""A cache that grows, keeps some sequences, and refuses what does not fit it."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from toys import memory_ffns, token_ids, transformer

from pkm_lightning.model import Transformer
from pkm_lightning.model.cache import DecodingCache


@pytest.fixture
def model() -> Transformer:
    return transformer(*memory_ffns()).eval()


@torch.no_grad()
def test_selected_sequences_go_on_as_alone(model: Transformer) -> None:
    ids_BT = token_ids(3, 9)
    full_BTD = model(ids_BT).hidden_BTD
    cache = model.new_cache(3, 9)
    model(ids_BT[:, :4], cache=cache)
    rows_B = torch.tensor([2, 0, 2])
    cache.select(rows_B)
    for t in range(4, 9):
        hidden_BD = model(ids_BT[rows_B, t : t + 1], cache=cache).hidden_BTD[:, 0]
        assert_close(hidden_BD, full_BTD[rows_B, t])
    assert cache.length == 9


@torch.no_grad()
def test_memory_is_taken_as_the_text_grows(model: Transformer) -> None:
    ids_BT = token_ids(2, 300)
    full_BTD = model(ids_BT).hidden_BTD
    cache, hidden = model.new_cache(2, 10**9), []
    for start, end in [(0, 3), (3, 4), (4, 140), (140, 141), (141, 300)]:
        hidden.append(model(ids_BT[:, start:end], cache=cache).hidden_BTD)
        buffer_BGLC = cache.layers[0].keys_BGLC
        assert buffer_BGLC is not None
        assert end <= buffer_BGLC.shape[2] == cache.room <= max(128, 2 * end)
    assert_close(torch.cat(hidden, 1), full_BTD)
    small = model.new_cache(2, 6)
    model(ids_BT[:, :5], cache=small)
    assert small.room == 6


@torch.no_grad()
def test_a_shortened_text_goes_on_as_if_it_had_never_been_longer(model: Transformer) -> None:
    ids_BT = token_ids(1, 12)
    cache = model.new_cache(1, 20)
    model(token_ids(1, 9), cache=cache)
    cache.truncate(0)
    model(ids_BT[:, :5], cache=cache)
    model(token_ids(1, 4), cache=cache)
    cache.truncate(5)
    assert_close(model(ids_BT[:, 5:], cache=cache).hidden_BTD, model(ids_BT).hidden_BTD[:, 5:])


@torch.no_grad()
def test_keys_have_the_precision_of_the_forward(model: Transformer) -> None:
    ids_BT = token_ids(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full_BTD = model(ids_BT).hidden_BTD
        cache = model.new_cache(2, 7)
        parts = [model(ids_BT[:, t : t + 1], cache=cache).hidden_BTD for t in range(7)]
    assert (torch.cat(parts, 1) - full_BTD).norm() / full_BTD.norm() < 0.05
    assert cache.layers[0].keys_BGLC is not None
    assert cache.layers[0].keys_BGLC.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize(
    ("sizes", "valid", "documents", "message"),
    [
        ((3, 2), None, False, "made for 2 sequences, the batch has 3"),
        ((2, 5), None, False, "2 tokens and 5 more exceed its capacity of 6"),
        ((2, 2), [[1, 1], [1, 0]], False, "before the first token"),
        ((2, 1), [[1], [0]], False, "before the first token"),
        ((2, 2), None, True, "one document"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    model: Transformer, sizes: tuple[int, int], valid: list[list[int]] | None, documents: bool, message: str
) -> None:
    cache = model.new_cache(2, 6)
    start_BT, next_BT = token_ids(2, 2), token_ids(2, 1)
    model(start_BT, cache=cache)
    ids_BT = token_ids(*sizes)
    with pytest.raises(ValueError, match=message):
        model(
            ids_BT,
            valid_BT=None if valid is None else torch.tensor(valid, dtype=torch.bool),
            doc_ids_BT=torch.zeros_like(ids_BT) if documents else None,
            cache=cache,
        )
    hidden_BTD = model(next_BT, cache=cache).hidden_BTD
    assert_close(hidden_BTD[:, 0], model(torch.cat([start_BT, next_BT], 1)).hidden_BTD[:, -1])


def test_the_past_of_a_plugin_is_padded_cut_back_and_selected() -> None:
    """Enters 1, 2 and 3 columns; each extension returns two earlier ones, or the fill where the text begins."""
    cache = DecodingCache(n_layers=1, batch=2, capacity=400, device=torch.device("cpu"))
    entered_BTC = torch.arange(2 * 300 * 3.0).view(2, 300, 3)
    past = cache.layers[0].past("ffn").part("variant")
    padded_BTC = torch.cat([torch.full((2, 2, 3), -1.0), entered_BTC], 1)
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 300)):
        cache.begin(torch.zeros(2, end - start, dtype=torch.int64), None)
        assert torch.equal(past.extend("x", entered_BTC[:, start:end], 2, -1.0), padded_BTC[:, start : end + 2])
        assert past.extend("y", entered_BTC[:, start:end, 0].long(), 0, 0).shape == (2, end - start)
        cache.advance(end - start)
    cache.truncate(4)
    cache.select(torch.tensor([1]))
    cache.begin(torch.zeros(1, 1, dtype=torch.int64), None)
    again_BTC = past.extend("x", entered_BTC[1:, 4:5], 2, -1.0)
    assert torch.equal(again_BTC, padded_BTC[1:, 4:7])
