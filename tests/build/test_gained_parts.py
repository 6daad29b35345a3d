"""Models that have gained variants and adapters since their weights were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adaptation.test_lora import KEYS, SMALL, logits
from toys import config, token_ids

from pkm_lightning.build.gained_parts import gained_variants, names_of_variants, rename_for
from pkm_lightning.build.model import build_model, load_pretrained
from pkm_lightning.checkpoints import open_checkpoint

BEFORE = ("ffn=memory_plus", "placement.layers=[1]", "extra_ffns=stem", "extra_ffns.stem.placement.layers=[0]")
#: Another variant whose table stands in front of that of `stem`, and one without tables.
WITH_ENGRAM = ("extra_ffns=[stem,engram]", "extra_ffns.engram.placement.layers=[1]", "extra_ffns.engram.ffn.rows=30")
WITH_DENSE = ("extra_ffns=[stem,dense]", "extra_ffns.dense.placement.layers=[1]")
STARTS: dict[str, tuple[list[str], list[str]]] = {
    "the same": ([], []),
    "a table in front of another": (list(WITH_ENGRAM), ["engram"]),
    "a dense FFN beside a memory": (list(WITH_DENSE), ["dense"]),
    "adapters": ([], []),
}


@pytest.mark.parametrize("case", STARTS)
def test_all_that_was_trained_is_loaded_and_the_model_computes_the_same(case: str, tmp_path: Path) -> None:
    changes, new = STARTS[case]
    before = config(*SMALL, *BEFORE)
    trained = build_model(before)
    trained.init_weights(3)
    content: dict[str, Any] = {
        "state_dict": {f"model.{name}": value for name, value in trained.state_dict().items()},
        "hyper_parameters": {"config": before},
        "tokens_seen": 5,
    }
    torch.save(content, tmp_path / "model.ckpt")
    after = config(*SMALL, *BEFORE, *changes)
    if case == "adapters":
        after["finetune"] = {"_target_": "pkm_lightning.adaptation.LoRA", **KEYS, "targets": ["ffn.*", "query"]}
    assert gained_variants(after, before) == new
    model = build_model(after)
    model.init_weights(4)
    load_pretrained(model, after, new)
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    gained = rename_for(checkpoint, model, after)
    targets = {f"state_dict.model.{name}": value for name, value in model.state_dict().items()}
    shapes = {name.removeprefix("state_dict."): tuple(value.shape) for name, value in targets.items()}
    assert checkpoint.misfits(shapes, gained) == ""
    checkpoint.read_into({name: value for name, value in targets.items() if name in checkpoint.shapes})
    assert {name for name in checkpoint.shapes if name not in targets} == set()
    ids_BT = token_ids()
    assert torch.equal(logits(model.eval(), ids_BT), logits(trained.eval(), ids_BT))
    if new:
        assert gained == {f"model.{name}" for name in names_of_variants(model, after, new)}


def test_a_variant_of_another_class_is_new() -> None:
    dense, memory = config(*SMALL, "ffn=dense"), config(*SMALL, "placement.mode=parallel")
    assert gained_variants(memory, dense) == ["ffn"]
    assert gained_variants(memory, memory) == []


def test_weights_that_find_no_place_are_named(tmp_path: Path) -> None:
    before, after = config(*SMALL, "ffn=dense"), config(*SMALL, "placement.layers=[1]")
    trained, model = build_model(before), build_model(after)
    content = {
        "state_dict": {f"model.{name}": value for name, value in trained.state_dict().items()},
        "hyper_parameters": {"config": before},
        "tokens_seen": 5,
    }
    torch.save(content, tmp_path / "model.ckpt")
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    gained = rename_for(checkpoint, model, after)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    assert "unexpected: model.blocks.1.ffn.up.weight" in checkpoint.misfits(shapes, gained)
