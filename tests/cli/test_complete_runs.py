"""A run and an export carry all that evaluation needs: no training data, any folder, an empty cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small import Run

from pkm_lightning.data.tokenizer import train_bpe

TEXT_RUN = [
    *("data=text", "data.path=corpus.txt", "data.seq_len=16", "data.vocab_size=300", "data.global_batch_size=4"),
    *("data.val_fraction=0.3", "trainer.max_steps=2", "trainer.val_check_interval=2", "model.memory.n_keys=16"),
    *("~callbacks.progress_bar", "logger=none"),
]


@pytest.fixture
def elsewhere(cli: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a copy of a run lies as `moved`; its data and cache are not at hand."""
    (tmp_path / "elsewhere").mkdir()
    trained.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("PKM_LIGHTNING_CACHE", str(tmp_path / "empty"))
    return tmp_path / "elsewhere"


def test_a_moved_run_gives_its_figures_without_data_and_cache(cli: Run, elsewhere: Path, tmp_path: Path) -> None:
    assert cli("test", "run_dir=moved").code == 0
    recorded = json.loads((elsewhere / "moved" / "run.json").read_text())["metrics"]
    again = json.loads((elsewhere / "moved" / "test.json").read_text())
    assert again == {name: recorded[name] for name in again}
    assert cli("validate", "run_dir=moved", "data.global_batch_size=5").code == 0
    assert cli("predict", "run_dir=moved", 'data.prompts=["Who"]').code == 0
    assert not (tmp_path / "empty").exists()


def test_a_text_run_is_used_without_its_text_and_an_export_without_its_run(cli: Run, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"The tower number {i} has {i * 7 % 97} steps.\n" for i in range(120)))
    assert cli("fit", *TEXT_RUN, "run_dir=run").code == 0
    before = cli("validate", "run_dir=run").out
    text.write_text("Something else.\n")
    assert cli("validate", "run_dir=run").out == before
    assert cli("export", "run_dir=run", "file=model.safetensors").code == 0
    shutil.rmtree(tmp_path / "run")
    text.unlink()
    shown = cli("predict", "ckpt=model.safetensors", 'data.prompts=["The tower"]', "out=answers.jsonl")
    assert shown.code == 0, shown.err
    assert json.loads((tmp_path / "answers.jsonl").read_text())["prompt"] == "The tower"
    assert (
        before.partition("val/loss")[2] == cli("validate", "ckpt=model.safetensors").out.partition("val/loss")[2] != ""
    )
    source = json.loads((tmp_path / "heldout" / "source.json").read_text())
    (tmp_path / "heldout" / "source.json").write_text(json.dumps({**source, "fingerprint": "of others"}))
    assert "corpus.txt does not exist" in cli("validate", "ckpt=model.safetensors").err


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("tokenizer.json", lambda content: content[:-9], "tokenizer.json cannot be read"),
        ("heldout/sequences.npz", lambda content: content[: len(content) // 2], "sequences.npz is damaged"),
        ("heldout/questions.json", lambda content: content[:-9], "questions.json is damaged"),
    ],
)
def test_what_a_run_has_kept_is_checked(cli: Run, trained: Path, file: str, damage: object, said: str) -> None:
    content = (trained / file).read_bytes()
    (trained / file).write_bytes(damage(content))  # type: ignore[operator]
    shown = cli("test", "run_dir=run")
    assert shown.code == 2
    assert said in shown.err


def test_the_tokenizer_of_another_model_is_refused_by_its_name(cli: Run, trained: Path) -> None:
    train_bpe(["one two one two"], 259).save(trained / "tokenizer.json")
    commands = [["test", "run_dir=run"], ["generate", "run_dir=run", "prompt=Who"]]
    commands += [["export", "run_dir=run", "file=model.safetensors"], ["fit", "init_from=run", "run_dir=new"]]
    for command in commands:
        assert "run/tokenizer.json is not the tokenizer that step-" in cli(*command).err, command
    assert not Path("model.safetensors").exists()


def test_an_export_does_not_overwrite_the_tokenizer_of_another_model(cli: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    shown = cli("export", "run_dir=run", "file=model.safetensors")
    assert shown.code == 2
    assert "the folder holds the tokenizer.json of another model" in shown.err
    assert "; give a file in a folder of its own, or replace it with overwrite=true." in shown.err
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / "other.safetensors").touch()
    shown = cli("export", "run_dir=run", "file=model.safetensors")
    assert (
        "would replace it, and leave other.safetensors in this folder with the tokenizer.json of another" in shown.err
    )
    shown = cli("export", "run_dir=run", "file=model.safetensors", "overwrite=true")
    assert shown.out.splitlines()[1:] == ["beside it: tokenizer.json, heldout/"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
