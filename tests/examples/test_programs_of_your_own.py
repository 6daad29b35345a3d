"""The programs under examples/ that use the layers without the command line run, and learn something."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tree import ROOT


@pytest.fixture(autouse=True)
def in_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)


def test_a_plain_loop_learns_facts() -> None:
    model, known = importlib.import_module("plain_pytorch_loop").train(steps=80)
    assert known > 0.2  # by chance 1/64
    assert "memory.values.reference.table.weight" in model.state_dict()


def test_a_lightning_module_learns_and_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    example: Any = importlib.import_module("own_lightning_module")
    trainer = example.train(steps=20)
    assert trainer.callback_metrics["train/loss"] < 4.0  # 5.5 before
    trainer.save_checkpoint(tmp_path / "bytes.ckpt")
    saved = torch.load(tmp_path / "bytes.ckpt", weights_only=True)
    assert [group.get("name") for group in saved["optimizer_states"][0]["param_groups"]] == [None, "table"]
    loaded = example.ByteModel.load_from_checkpoint(tmp_path / "bytes.ckpt", weights_only=True)
    assert torch.equal(loaded.memory.values.table.weight, trainer.lightning_module.memory.values.table.weight)


def test_a_llama_with_a_memory_learns() -> None:
    example: Any = importlib.import_module("transformers_ffn")
    _, _, before = example.train(steps=1)
    _, _, after = example.train(steps=15)
    assert after < before - 0.3
