"""Layers below the first plugin: computed once per sequence, with the same result."""

from __future__ import annotations

from pathlib import Path

import pretrained_models
import pytest
import torch
from ffn.drawn_weights import draw
from huggingface.test_retrofit import logits, retrofit, start
from tolerances import assert_close
from torch import Tensor, nn

from pkm_lightning.adaptation import lower_layers
from pkm_lightning.adaptation.lower_layers import lower_layers_once
from pkm_lightning.model import Transformer


def model_of(name: str, folder: Path) -> Transformer:
    run = retrofit(
        *(pretrained_models.save(name, folder), "ffn=memory_plus", "placement.layers=[1]", "placement.mode=parallel")
    )
    model = start(run.config)
    draw(model)
    return model.requires_grad_(False)


def counted(layer: nn.Module) -> list[int]:
    """Returns a list that grows by the number of sequences of each forward of the layer's FFN."""
    sequences: list[int] = []
    layer.get_submodule("mlp").register_forward_pre_hook(lambda _, inputs: sequences.append(len(inputs[0])))
    return sequences


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(2, pretrained_models.VOCAB, (rows, 9)), (torch.arange(9) >= 4).long().expand(rows, -1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forwards_are_the_same_and_no_sequence_is_computed_twice(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    ids_BT, doc_ids_BT = drawn(3)
    calls = [(ids_BT, None), (ids_BT, doc_ids_BT), (ids_BT, None), (ids_BT[[2, 0]], None)]
    expected = [logits(model, ids, doc_ids_BT=documents) for ids, documents in calls]
    layer = model.blocks[0]
    sequences = counted(layer)
    with lower_layers_once(model):
        got = [logits(model, ids, doc_ids_BT=documents) for ids, documents in calls]
        assert sequences == [3, 3]
    # Sequences of a batch that come together again are computed alike, bit for bit.
    assert all(map(torch.equal, got[:3], expected[:3]))
    assert_close(got[3], expected[3])
    assert "forward" not in vars(layer)
    logits(model, ids_BT)
    assert sequences == [3, 3, 3]


def test_gradients_of_what_lies_above_are_the_same(tmp_path: Path) -> None:
    model, (ids_BT, _) = model_of("llama", tmp_path), drawn(2)
    weight = model.tables[0].weight.requires_grad_()  # type: ignore[union-attr, operator]

    def gradient() -> Tensor:
        (part,) = torch.autograd.grad(logits(model, ids_BT).square().mean(), [weight])
        return part

    expected = gradient()
    with lower_layers_once(model):
        assert torch.equal(gradient(), expected)
        assert torch.equal(gradient(), expected)


def test_sequences_beyond_the_memory_are_computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids_BT, _) = model_of("llama", tmp_path), drawn(2)
    expected, sequences = logits(model, ids_BT), counted(model.blocks[0])
    monkeypatch.setattr(lower_layers, "_MOST_BYTES", 0)
    with lower_layers_once(model):
        assert torch.equal(logits(model, ids_BT), expected)
    assert sum(sequences) >= 2
