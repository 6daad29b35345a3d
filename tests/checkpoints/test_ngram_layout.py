"""What is read of a folder with n-gram tables, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ngram_folders import CONFIG, LAYERS, write_folder
from safetensors.torch import load_file, save_file

from pkm_lightning.checkpoints.ngram_layout import TABLE, find_ngrams
from pkm_lightning.errors import CheckpointError, ConfigError, PkmError

KEY = "model.layers.1.ple.key_proj.weight"
PART = f"model.layers.4.ple.{TABLE}.shard_2.weight"


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(("prefix", "parts"), [("model.", 4), ("model.language_model.", 1), ("", 3)])
def test_tensors_and_tables(tmp_path: Path, prefix: str, parts: int, files: int) -> None:
    whole = write_folder(tmp_path / "qwen", prefix=prefix, parts=parts, files=files, dtype=torch.bfloat16)
    folder = find_ngrams(tmp_path / "qwen")
    assert folder.sizes.layers == LAYERS
    for layer in LAYERS:
        folder.check_layer(layer)
        rows = torch.cat([folder.tensor(layer, name) for name in folder.parts(layer)])
        assert torch.equal(rows, whole[f"layers.{layer}.ple.{TABLE}.weight"])
        for name in folder.shapes():
            assert torch.equal(folder.tensor(layer, name), whole[f"layers.{layer}.ple.{name}"]), name
        shard = "" if parts == 1 else "shard_*."
        assert folder.table_tensor(layer) == f"{prefix}layers.{layer}.ple.{TABLE}.{shard}weight"


def test_sizes_of_a_model_with_vision_and_of_left_out_values(tmp_path: Path) -> None:
    write_folder(tmp_path / "qwen")
    whole = find_ngrams(tmp_path / "qwen").sizes
    text = {name: value for name, value in CONFIG.items() if name not in ("rms_norm_eps", "ple_conv_kernel_size")}
    text |= {"model_type": "qwen4_exp_text", "eos_token_id": [3, 7]}
    outer = {"model_type": "qwen4_exp", "text_config": text, "vocab_size": 1}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(outer))
    assert find_ngrams(tmp_path / "qwen").sizes == whole


def check(path: Path) -> None:
    folder = find_ngrams(path, "ffn.path=")
    for layer in LAYERS:
        folder.check_layer(layer)


def with_config(**changes: Any) -> Callable[[Path], object]:
    content = {name: value for name, value in {**CONFIG, **changes}.items() if value != "absent"}
    return lambda folder: (folder / "config.json").write_text(json.dumps(content))


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")

    return write


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.truncate(2000)


def with_lost_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: "model-9.safetensors"}}))


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_tables(folder: Path) -> None:
    save_file({"embedding": torch.zeros(1)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (with_config(ple_layer_ids=[]), ConfigError, "has no layer with an n-gram table (ple_layer_ids is empty)"),
        (with_config(ple_layer_ids=None), ConfigError, "ple_layer_ids is empty"),
        (with_config(ple_layer_ids=[0]), ConfigError, "ple_layer_ids=[0] is no list of layer numbers from 1 on"),
        (with_config(ple_layer_ids=[5]), ConfigError, "layer 1 of KEY has no n-gram table; those that have one: 4."),
        (with_config(model_type="qwen3"), ConfigError, "is of model_type='qwen3'"),
        (with_config(model_type="qwen4exp"), ConfigError, "Did you mean 'qwen4_exp'?"),
        (with_config(vocab_size="absent"), ConfigError, "its config.json has no vocab_size"),
        (with_config(eos_token_id="absent"), ConfigError, "its config.json has no eos_token_id"),
        (with_config(ngram_size=1), ConfigError, "ngram_size=1 is out of range; allowed: 2 or more"),
        (with_config(seed="7"), ConfigError, "seed='7' is not a number"),
        (with_config(ple_embed_dim=13), ConfigError, "ple_embed_dim=13 is no multiple of its 4 reads"),
        (
            with_config(hidden_size=16),
            CheckpointError,
            "key_proj.weight has 16 x 12 values of float32, and config.json",
        ),
        (without_config, CheckpointError, "config.json cannot be read (No such file or directory)"),
        (without_tables, CheckpointError, "holds no tensors layers.L.ple.*"),
        (cut, CheckpointError, "model.safetensors is no whole safetensors file ("),
        (with_lost_shard, CheckpointError, "model-9.safetensors cannot be read (No such file or directory)"),
        (with_tensor(KEY, lambda _: None), CheckpointError, f"lacks {KEY}, which its config.json asks for"),
        (with_tensor(KEY, torch.Tensor.int), CheckpointError, "16 x 12 values of int32, and config.json asks for"),
        (with_tensor(PART, lambda _: None), CheckpointError, f"lacks {PART}"),
        (with_tensor(PART, lambda rows: rows[:, :2].clone()), CheckpointError, "asks for rows x 3 of floating point"),
        (with_tensor(PART, lambda rows: rows.to(torch.float8_e4m3fn)), CheckpointError, "values of float8_e4m3fn"),
    ],
)
def test_refusals(tmp_path: Path, change: Callable[[Path], object], error: type[PkmError], message: str) -> None:
    write_folder(tmp_path / "qwen")
    change(tmp_path / "qwen")
    with pytest.raises(error, match=re.escape(message.replace("KEY", f"ffn.path={tmp_path / 'qwen'}"))) as caught:
        check(tmp_path / "qwen")
    assert "ffn.path=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        find_ngrams(tmp_path / "absent")
