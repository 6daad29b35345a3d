"""A cache that grows, keeps some sequences, and refuses what does not fit it."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from toys import memory_ffns, token_ids, transformer

from pkm_lightning.model import Transformer


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
