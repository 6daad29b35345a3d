"""`export`, and what answers from its file: the same answers, copied into memory or mapped; wrong calls are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL_RUN, Run

from pkm_lightning.checkpoints import sharded
from pkm_lightning.checkpoints.tree import flatten

FILE = "file=model.safetensors"
PROMPTS = 'data.prompts=["The capital of France is","Who"]'


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return next((trained / "checkpoints").iterdir())


def test_all_ways_to_the_weights_give_the_same_answers_and_losses(cli: Run, trained: Path, checkpoint: Path) -> None:
    shown = cli("export", "run_dir=run", FILE)
    assert shown.code == 0, shown.err
    assert f"from {checkpoint}" in shown.out
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    found = load_file("model.safetensors")
    assert {f"model.{name}" for name in found} == saved.keys()
    assert all(torch.equal(found[name.removeprefix("model.")], value) for name, value in saved.items())

    folder = trained / "checkpoints" / "folder.ckpt"
    sharded.save(*flatten(torch.load(checkpoint, weights_only=True)), folder)
    assert cli("export", f"ckpt={folder}", "file=from-folder.safetensors").code == 0
    assert Path("from-folder.safetensors").read_bytes() == Path("model.safetensors").read_bytes()

    ways: list[list[str]] = [[f"ckpt={checkpoint}"], [f"ckpt={folder}"], ["ckpt=model.safetensors"]]
    ways += [[*ways[0], "table.device=mmap"], [*ways[2], "table.device=mmap"]]
    answers = []
    for i, way in enumerate(ways):
        shown = cli("predict", *way, PROMPTS, f"out={i}.jsonl")
        assert shown.code == 0, shown.err
        answers.append([json.loads(line) for line in Path(f"{i}.jsonl").read_text().splitlines()])
    assert answers[1:] == answers[:-1]
    assert len(answers[0]) == 2

    metrics: list[Any] = []
    for way in (["run_dir=run"], ["run_dir=run", "ckpt=model.safetensors", "table.device=mmap"]):
        assert cli("validate", *way).code == 0
        metrics.append(json.loads((trained / "validate.json").read_text()))
    assert metrics[0] == metrics[1]


def test_an_existing_file_is_replaced_only_on_demand(cli: Run, checkpoint: Path) -> None:
    Path("model.safetensors").write_text("mine")
    refused = cli("export", "run_dir=run", FILE)
    assert refused.code == 2
    assert "model.safetensors exists; choose another name, or replace it with overwrite=true" in refused.err
    assert Path("model.safetensors").read_text() == "mine"
    assert cli("export", "run_dir=run", FILE, "overwrite=true").code == 0
    assert len(load_file("model.safetensors")) > 5
    again = cli("export", "ckpt=model.safetensors", "file=other.safetensors")
    assert "is an exported file already" in again.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([FILE], "export needs run_dir=RUN_DIRECTORY or ckpt=CHECKPOINT"),
        (["run_dir=run"], "export needs file=NAME.safetensors"),
        (["run_dir=run", "file=model.bin"], "does not end in .safetensors"),
        (["run_dir=run", "file=no/model.safetensors"], "the folder no does not exist"),
        (["run_dir=run", FILE, "overwrite=perhaps"], "overwrite='perhaps' is neither true nor false"),
        (["run_dir=elsewhere", FILE], "is no directory"),
        (["ckpt=elsewhere.ckpt", FILE], "ckpt=elsewhere.ckpt does not exist"),
        (["ckpt=run", FILE], "ckpt=run is damaged or no checkpoint"),
        (["ckpt=run/config.yaml", FILE], "ckpt=run/config.yaml is damaged or no checkpoint"),
        (["ckpt=other.ckpt", FILE], "was not written by this package"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    cli: Run, trained: Path, arguments: list[str], said: str
) -> None:
    torch.save({"state_dict": {"model.a": torch.ones(2)}}, "other.ckpt")
    shown = cli("export", *arguments)
    assert shown.code == 2
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(entry.name for entry in Path.cwd().iterdir()) == ["other.ckpt", "run"]


def test_a_table_stays_in_one_file_and_only_for_reading(cli: Run, checkpoint: Path) -> None:
    refused = cli("fit", *SMALL_RUN, "run_dir=new", "table.device=mmap")
    assert refused.code == 2
    assert "table.device=mmap is for validate, test and predict" in refused.err
    assert not Path("new").exists()
    sharded.save(*flatten(torch.load(checkpoint, weights_only=True)), Path("folder.ckpt"))
    refused = cli("predict", "ckpt=folder.ckpt", PROMPTS, "table.device=mmap")
    assert refused.code == 2
    assert "export ckpt=folder.ckpt file=model.safetensors" in refused.err
    refused = cli("predict", f"ckpt={checkpoint}", PROMPTS, "table.learning=dense")
    assert "the saved configuration of a run wins" in refused.err
    refused = cli("predict", f"ckpt={checkpoint}", PROMPTS, "table.device=mmap", "trainer.precision=bf16-true")
    assert refused.code == 2
    assert "reads the table as it was saved (torch.float32), not as torch.bfloat16" in refused.err


def test_a_planted_configuration_is_refused_in_an_exported_file_too(cli: Run, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["config"]["callbacks"] = {"x": {"_target_": "subprocess.Popen", "args": ["true"]}}
    torch.save(content, "planted.ckpt")
    assert cli("export", "ckpt=planted.ckpt", FILE).code == 0
    shown = cli("predict", "ckpt=model.safetensors", PROMPTS)
    assert shown.code == 2
    assert "trust_config=true" in shown.err
