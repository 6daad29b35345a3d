"""docs/teaching.md, typed from its first command to its last: on a tiny model, and on the real one in 30 minutes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pretrained_models
import pytest
import torch
from huggingface.test_smollm2 import FILE
from pages import OURS, blocks, words
from small import Run
from tree import ROOT

import pkm_lightning
from pkm_lightning.checkpoints.edit_file import Edit

PAGE = ROOT / "docs" / "teaching.md"
#: The tiny model has two layers, and its random weights are not worth more steps.
TINY = {"placement.layers=[20]": "placement.layers=[1]", "max_seconds=600": "max_steps=2", "drift_tokens=8192": ""}
WITHIN_S = 30 * 60


def commands(cli: Run, number: int, changes: dict[str, str]) -> list[str]:
    """Runs the commands of a block of the page; returns what each printed."""
    printed = []
    for command in blocks(PAGE)[number].splitlines():
        assert command.startswith(OURS)
        arguments = [changes.get(word, word) for word in words(command)]
        shown = cli(*filter(None, arguments))
        assert shown.code == 0, f"{command}\n{shown.err}"
        printed.append(shown.out)
    return printed


def follow(cli: Run, folder: Path, changes: dict[str, str]) -> Edit:
    """Follows the page in the working directory; returns the edit that it writes."""
    shutil.copytree(ROOT / "docs", folder / "my_texts", ignore=lambda _, names: [n for n in names if n[-3:] != ".md"])
    write_facts, load = blocks(PAGE, "python")
    commands(cli, 0, changes)
    exec(write_facts, {})
    assert len(Path("towns.jsonl").read_text().splitlines()) == 100
    untaught = pkm_lightning.load("memory.safetensors").answer("Leifarrow is twinned with", max_new_tokens=5)
    _, answer, removed, applied = commands(cli, 1, changes)
    assert "towns is removed" in removed
    assert "towns is applied: 100 facts" in applied
    taught = pkm_lightning.load("memory.safetensors")
    assert taught.answer("Leifarrow is twinned with", max_new_tokens=1)[:1] == answer.strip()[:1]
    removed_again = pkm_lightning.load("memory.safetensors", edits=[])
    assert removed_again.answer("Leifarrow is twinned with", max_new_tokens=5) == untaught
    commands(cli, 2, changes)
    exec(load, {})
    return Edit.load(Path("memory.edits/towns.safetensors"))


@pytest.mark.slow
def test_every_command_of_the_page_works_on_a_tiny_model(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained_models, "CONTEXT", 256)  # a token is a byte here
    pretrained_models.save_gguf("llama", tmp_path / "smollm2.gguf")
    edit = follow(cli, tmp_path, TINY)
    assert len(edit.facts) == 100
    assert edit.figures["question"]["prompts"] == 100


@pytest.mark.slow
@pytest.mark.skipif(FILE is None, reason="set PKM_LIGHTNING_SMOLLM2, see huggingface/test_smollm2.py")
def test_smollm2_learns_the_facts_of_the_page_in_half_an_hour(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "smollm2.gguf").symlink_to(Path(str(FILE)).resolve())
    began = time.perf_counter()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        figures = follow(cli, tmp_path, {}).figures
    finally:
        torch.set_num_threads(1)
    print(json.dumps(figures), f"{time.perf_counter() - began:.0f} s")
    assert time.perf_counter() - began < WITHIN_S
    assert figures["learned"]["before"] < 0.05
    assert figures["learned"]["after"] > 0.5
    assert figures["kl"] <= 0.0033
