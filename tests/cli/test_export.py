"""`export`, and verbs that read its file: the same answers from a copy in memory and from mapped tensors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL_RUN, Run

from pkm_lightning.checkpoints import SavedCheckpoint, sharded
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.cli.export import run
from pkm_lightning.cli.job import Job
from pkm_lightning.errors import ConfigError

FILE = "file=model.safetensors"
PROMPTS = 'data.prompts=["The capital of France is","Who"]'


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return next((trained / "checkpoints").iterdir())


@pytest.mark.slow
def test_all_forms_of_the_weights_give_the_same_answers_and_losses(cli: Run, trained: Path, checkpoint: Path) -> None:
    shown = cli("export", "run_dir=run", FILE)
    assert shown.code == 0, shown.err
    assert f"from {checkpoint}" in shown.out
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    exported = load_file("model.safetensors")
    assert {f"model.{name}" for name in exported} == saved.keys()
    assert all(torch.equal(exported[name.removeprefix("model.")], value) for name, value in saved.items())

    folder = trained / "checkpoints" / "folder.ckpt"
    sharded.save(*flatten(torch.load(checkpoint, weights_only=True)), folder)
    Path("from-folder.safetensors").write_text("mine")
    again = ["export", f"ckpt={folder}", "file=from-folder.safetensors"]
    refused = cli(*again)
    assert refused.code == 2
    assert "from-folder.safetensors exists; choose another name, or replace it with overwrite=true" in refused.err
    assert Path("from-folder.safetensors").read_text() == "mine"
    assert cli(*again, "overwrite=true").code == 0
    assert Path("from-folder.safetensors").read_bytes() == Path("model.safetensors").read_bytes()

    forms: list[list[str]] = [[f"ckpt={checkpoint}"], [f"ckpt={folder}"], ["ckpt=model.safetensors"]]
    answers = []
    for i, form in enumerate([*forms, [*forms[0], "table.device=mmap"]]):
        shown = cli("predict", *form, PROMPTS, f"out={i}.jsonl")
        assert shown.code == 0, shown.err
        answers.append([json.loads(line) for line in Path(f"{i}.jsonl").read_text().splitlines()])
    assert answers[1:] == answers[:-1]
    assert len(answers[0]) == 2

    tables = []
    for form in (["run_dir=run"], ["ckpt=model.safetensors", "table.device=mmap"]):
        shown = cli("validate", *form)
        assert shown.code == 0
        tables.append([line for line in shown.out.splitlines() if "val/" in line])
    assert tables[0] == tables[1] != []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "export needs file=NAME.safetensors, the file to write, or format=hf dir=FOLDER"),
        ({"file": "model.bin"}, "does not end in .safetensors"),
        ({"file": "no/model.safetensors"}, "the folder no does not exist"),
        ({"file": "model.safetensors", "overwrite": "perhaps"}, "overwrite='perhaps' is neither true nor false"),
        ({"file": "model.safetensors", "dir": "hf"}, "dir=hf is of format=hf"),
        ({"format": "hf"}, "format=hf needs dir=FOLDER"),
        (
            {"format": "hf", "file": "model.safetensors", "dir": "hf"},
            "is of format=safetensors; format=hf writes a folder",
        ),
        ({"format": "hf", "dir": "full/notes.txt"}, "dir=full/notes.txt is a file"),
        ({"format": "hf", "dir": "no/hf"}, "the folder .*/no does not exist"),
        ({"format": "hf", "dir": "full"}, "dir=full is not empty; choose another name, or replace it"),
        ({"format": "hf", "dir": "."}, "dir=. is or holds the working directory"),
        ({"format": "hf", "dir": "..", "overwrite": True}, "dir=.. is or holds the working directory"),
        ({"format": "json", "dir": "hf"}, "format='json' is not known; allowed: safetensors, hf"),
        ({"format": "HF", "dir": "hf"}, "format='HF' is not known"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_written(
    given: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    settings = {"format": None, "file": None, "dir": None, "overwrite": False, **given}
    with pytest.raises(ConfigError, match=reason):
        run(cast(Job, SimpleNamespace(config=SimpleNamespace(**settings), overrides=[])))


def test_a_folder_for_transformers(cli: Run, trained: Path, checkpoint: Path) -> None:
    """Tests the command; tests/huggingface loads such folders."""
    command = ["export", "run_dir=run", "format=hf", "dir=hf"]
    shown = cli(*command)
    assert shown.code == 0, shown.err
    assert "hf: PkmLightningForCausalLM, 29 tensors" in shown.out
    assert f"from {checkpoint}" in shown.out
    exported = load_file("hf/model.safetensors")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(exported[name.removeprefix("model.")], value) for name, value in saved.items())
    assert "Lahman Baseball Database" in Path("hf/README.md").read_text()
    refused = cli(*command)
    assert refused.code == 2
    assert "dir=hf is not empty; choose another name, or replace it with overwrite=true" in refused.err
    Path("hf/README.md").write_text("mine")
    assert cli(*command, "overwrite=true", "quantize=int8").code == 0
    assert Path("hf/README.md").read_text() != "mine"
    assert load_file("hf/model.safetensors")["tables.0.codes"].dtype == torch.uint8
    Path("hf/notes.txt").write_text("mine")
    refused = cli(*command, "overwrite=true")
    assert refused.code == 2
    assert "dir=hf holds notes.txt, which no export has written" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert sorted(entry.name for entry in Path.cwd().iterdir()) == ["hf", "run"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ckpt=run/config.yaml", FILE], "run/config.yaml is damaged or no checkpoint"),
        (["ckpt=old.safetensors", FILE], "is an exported file already"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    cli: Run, trained: Path, checkpoint: Path, arguments: list[str], reason: str
) -> None:
    write(SavedCheckpoint(checkpoint), Path("old.safetensors"))
    shown = cli("export", *arguments)
    assert shown.code == 2
    assert reason in shown.err
    assert len(shown.err.splitlines()) == 1
    assert sorted(entry.name for entry in Path.cwd().iterdir()) == ["old.safetensors", "run"]


def test_a_table_is_mapped_from_one_file_and_only_for_reading(cli: Run, checkpoint: Path) -> None:
    refused = cli("fit", *SMALL_RUN, "run_dir=new", "table.device=mmap")
    assert refused.code == 2
    assert "set table.trainable=false and table.path=FILE to train the rest of the model beside it" in refused.err
    assert not Path("new").exists()
    sharded.save(*flatten(torch.load(checkpoint, weights_only=True)), Path("folder.ckpt"))
    refused = cli("predict", "ckpt=folder.ckpt", PROMPTS, "table.device=mmap")
    assert refused.code == 2
    assert "export ckpt=folder.ckpt file=model.safetensors" in refused.err
    refused = cli("predict", f"ckpt={checkpoint}", PROMPTS, "table.device=mmap", "trainer.precision=bf16-true")
    assert refused.code == 2
    assert "reads the table as it was saved (torch.float32), not as torch.bfloat16" in refused.err


def test_a_planted_configuration_is_refused_in_an_exported_file_too(cli: Run, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["config"]["callbacks"] = {"x": {"_target_": "subprocess.Popen", "args": ["true"]}}
    torch.save(content, "planted.ckpt")
    write(SavedCheckpoint("planted.ckpt"), Path("model.safetensors"))
    shown = cli("predict", "ckpt=model.safetensors", PROMPTS)
    assert shown.code == 2
    assert "trust_config=true" in shown.err


def test_a_template_of_another_model_is_removed_only_on_request(cli: Run, trained: Path, checkpoint: Path) -> None:
    Path("chat_template.jinja").write_text("{{ messages }}")
    refused = cli("export", f"ckpt={checkpoint}", FILE)
    assert "the folder holds the chat_template.jinja of another model" in refused.err
    assert cli("export", f"ckpt={checkpoint}", FILE, "overwrite=true").code == 0
    assert not Path("chat_template.jinja").exists()


def test_keys_of_the_model_are_for_a_pretrained_one(cli: Run, trained: Path) -> None:
    shown = cli("export", "run_dir=run", "model.dim=64", "file=model.safetensors")
    assert shown.code == 2
    assert "export does not read model of a run or checkpoint, only of a pretrained model: model=hf" in shown.err
