"""Weights of adapters: their names, and checkpoints in which they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adaptation.test_lora import KEYS, SMALL, logits
from tolerances import assert_close
from torch import Tensor
from toys import config, token_ids

from pkm_lightning.build.adapters import base_name, merge_adapters
from pkm_lightning.build.model import build_model
from pkm_lightning.checkpoints import SavedCheckpoint, open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.model import Transformer


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("blocks.0.attention.query.base_layer.weight", "blocks.0.attention.query.weight"),
        ("network.transformer.h.0.attn.c_attn.base_layer.bias", "network.transformer.h.0.attn.c_attn.bias"),
        ("blocks.0.attention.query.lora_A.default.weight", None),
        ("blocks.0.attention.query.lora_B.default.weight", None),
        ("tables.0.weight", "tables.0.weight"),
    ],
)
def test_base_names(name: str, base: str | None) -> None:
    assert base_name(name) == base


def saved(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[Transformer, SavedCheckpoint]:
    """Returns a model with adapters that have learned, and the checkpoint in which it is saved."""
    settings = config(*SMALL, "placement.layers=[1]")
    settings["finetune"] = {"_target_": "pkm_lightning.adaptation.LoRA", **KEYS, **keys}
    model = build_model(settings).to(dtype)
    model.init_weights(3)
    for name, value in model.state_dict().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(value)
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"config": settings},
        "tokens_seen": 5,
    }
    torch.save(content, folder / "model.ckpt")
    return model.eval(), open_checkpoint(folder / "model.ckpt")


def merged(checkpoint: SavedCheckpoint, folder: Path) -> tuple[Transformer, dict[str, Tensor]]:
    """Returns the model of the merged checkpoint, read from its export."""
    merge_adapters(checkpoint)
    write(checkpoint, folder / "merged.safetensors")
    exported = open_checkpoint(folder / "merged.safetensors")
    model = build_model(exported.config)
    state = exported.map()["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval(), state


def test_the_merged_model_computes_what_the_unmerged_one_does(tmp_path: Path) -> None:
    model, checkpoint = saved(tmp_path, targets=["attention.*", "ffn.up", "ffn.gate", "query.projection"])
    plain, state = merged(checkpoint, tmp_path)
    own = model.state_dict()
    assert state.keys() == {f"model.{base}" for name in own if (base := base_name(name)) is not None}
    layer = "blocks.1.attention.query"
    change = own[f"{layer}.lora_B.default.weight"] @ own[f"{layer}.lora_A.default.weight"] * 12 / 3
    assert_close(state[f"model.{layer}.weight"], own[f"{layer}.base_layer.weight"] + change)
    assert torch.equal(state["model.tables.0.weight"], own["tables.0.weight"])
    name = "blocks.1.ffn.addressing.query.projection"
    assert torch.equal(state[f"model.{name}.bias"], own[f"{name}.base_layer.bias"])
    ids_BT = token_ids()
    assert_close(logits(plain, ids_BT), logits(model, ids_BT))


def test_sums_of_bf16_weights_are_rounded_once(tmp_path: Path) -> None:
    model, checkpoint = saved(tmp_path, torch.bfloat16)
    _, state = merged(checkpoint, tmp_path)
    own, layer = model.state_dict(), "blocks.0.ffn.up"
    parts = (own[f"{layer}.{part}.weight"].float() for part in ("lora_B.default", "lora_A.default", "base_layer"))
    up_XR, down_RX, base_XX = parts
    assert torch.equal(state[f"model.{layer}.weight"], (base_XX + up_XR @ down_RX * 4).bfloat16())


def test_targets_are_filled_with_merged_weights(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    merge_adapters(checkpoint)
    names = [name for name in checkpoint.shapes if name.startswith("state_dict.")]
    targets = {name: torch.empty(checkpoint.shapes[name][0]) for name in names}
    checkpoint.read_into(targets)
    for name, values in targets.items():
        assert torch.equal(values, checkpoint.chunks(name)[0].values), name
    assert checkpoint.config["finetune"] == {}
    assert checkpoint.misfits({n.removeprefix("state_dict."): v.shape for n, v in targets.items()}) == ""


def test_a_checkpoint_without_adapters_stays_as_it_is(tmp_path: Path) -> None:
    settings = config(*SMALL)
    model = build_model(settings)
    content = {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"config": settings},
        "tokens_seen": 5,
    }
    torch.save(content, tmp_path / "model.ckpt")
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    before = dict(checkpoint.shapes)
    merge_adapters(checkpoint)
    assert checkpoint.shapes == before


@pytest.mark.parametrize(("model_type", "is_transposed"), [("gpt2", True), ("starcoder2", False), ("gpt_neo", False)])
def test_a_square_matrix_is_transposed_in_gpt2_alone(model_type: str, is_transposed: bool, tmp_path: Path) -> None:
    layer, (up_XR, down_RX) = "state_dict.model.network.h.0.c_proj", (torch.randn(4, 1), torch.randn(1, 4))
    weights = {"base_layer": torch.zeros(4, 4), "lora_A.default": down_RX, "lora_B.default": up_XR}
    settings = config(*SMALL)
    settings["model"]["architecture"] = {"model_type": model_type}
    settings["finetune"] = {"alpha": 1, "rank": 1}
    content = {
        "state_dict": {f"{layer.removeprefix('state_dict.')}.{part}.weight": w for part, w in weights.items()},
        "hyper_parameters": {"config": settings},
        "tokens_seen": 5,
    }
    torch.save(content, tmp_path / "model.ckpt")
    checkpoint = open_checkpoint(tmp_path / "model.ckpt")
    merge_adapters(checkpoint)
    change_XX = up_XR @ down_RX
    (chunk,) = checkpoint.chunks(f"{layer}.weight")
    assert torch.equal(chunk.values, change_XX.T if is_transposed else change_XX)
