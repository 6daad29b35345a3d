"""Overrides on a run are applied to its saved configuration: nothing is a change that the user did not ask for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small import Run, record

from pkm_lightning.cli import fit
from pkm_lightning.cli.evaluation import SavedRun
from pkm_lightning.errors import PkmError

WORDS = "the cat sat on a mat and saw the dog run under the old blue tree by the river . "
#: A run that differs from the defaults in its groups, by an added key and by a removed callback.
COMMAND = [
    "fit", "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=32", "data.global_batch_size=4",
    "model.n_layers=1", "model.dim=32", "model.ffn_dim=32", "model.n_heads=2", "model.n_kv_heads=2", "ffn=dense",
    "trainer.max_steps=4", "+trainer.limit_val_batches=2", "callbacks.step_checkpoint.every_n_steps=2",
    "~callbacks.progress_bar", "~callbacks.recall", "logger=none", "run_dir=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def run(cli: Run, of_module: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run of COMMAND in `run`, trained once; commands stop where they would begin to work."""
    monkeypatch.chdir(of_module)
    if not (of_module / "run").exists():
        for name in "ab":
            Path(f"{name}.txt").write_text(name + WORDS * 40)
        assert cli(*COMMAND).code == 0
    assert record(of_module / "run")["status"] == "finished"
    monkeypatch.setattr(fit, "_check_checkpoint", _reached)
    monkeypatch.setattr(SavedRun, "trainer", _reached)
    return cli


def _reached(*_: Any) -> None:
    raise PkmError("reached")


ALLOWED: dict[str, list[str]] = {
    "nothing": [],
    "equal values and groups, and what it had removed": [
        *("data.path=a.txt", "data.seq_len=32", "model.dim=32", "seed=1", "+trainer.limit_val_batches=2"),
        *("ffn=dense", "optim=adamw", "table/optimizer=lazy_adam", "logger=none", "strategy=single"),
        "~callbacks.progress_bar",
    ],
    "the machine": ["table.shard=row", "device_memory=64", "strategy=ddp"],
    "the whole command": COMMAND[1:-1],
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_continued_run_may_be_told(run: Run, what: str) -> None:
    shown = run("fit", "run_dir=run", "resume=always", *ALLOWED[what])
    assert shown.err.strip() == "error: reached", shown.err


REFUSED: dict[str, tuple[list[str], str]] = {
    "a value": (["optim.lr=0.5"], r"another configuration \(optim\.lr: 0\.006 -> 0\.5\);"),
    "a key of its own data": (["data.path=b.txt"], r"another configuration \(data\.path: a\.txt -> b\.txt\);"),
    "two": (["seed=2", "data.path=b.txt"], r"\(seed: 1 -> 2; data\.path: a\.txt -> b\.txt\);"),
    "a plugin": (["ffn=moe"], r"another configuration \(ffn: pkm_lightning\.ffn\.Dense -> pkm_lightning\.ffn\.MoE\);"),
    "data": (["data=facts"], r"\(data: pkm_lightning\.data\.TextDataModule -> pkm_lightning\.data\.FactsDataModule\);"),
    "a group and its values": (
        ["optim=adamw", "optim.lr=0.5"],
        r"another configuration \(optim\.lr: 0\.006 -> 0\.5\);",
    ),
    "a nested group": (["table/optimizer=sgd"], r"another configuration \(table\.optimizer\.rule: lazy_adam -> sgd"),
    "a removed callback": (["~callbacks.throughput"], r"\(callbacks\.throughput: pkm_.*Throughput -> \(absent\)\);"),
    "a typo": (["data.pth=b.txt"], r"data\.pth is not a key.* Did you mean 'path'\?"),
    "an option": (
        ["ffn=desne"],
        r"ffn=desne is not known; allowed: custom, dense, .*ultramem_v2\. Did you mean 'dense'",
    ),
    "a key of other data": (["data.people=3"], r"data\.people is not a key of the configuration"),
    "a callback that it lacks": (["callbacks.recall.val_items=3"], r"callbacks\.recall\.val_items is not a key"),
    "a removed group": (["~optim"], r"another configuration \(optim: \{\.\.\.\} -> \(absent\)\);"),
    "a removed group with a class": (["~trainer"], r"\(trainer: lightning\.pytorch\.Trainer -> \(absent\)\);"),
    "removed callbacks": (["~callbacks"], r"\(callbacks: \{\.\.\.\} -> \(absent\)\);"),
    "a removed key": (["~seed"], r"~seed: fit cannot do without seed"),
    "a removed length": (["~trainer.max_steps"], r"trainer\.max_steps=None is not a number"),
    "what another key refers to": (["~devices"], r"trainer\.devices refers to a key that is missing"),
    "a sweep in its folder": (["-m", "seed=1,2"], r"run_dir=run holds a run, and a sweep would train others in"),
    "a removal with a typo": (["~callbacks.progres_bar"], r"'callbacks\.progres_bar' does not exist"),
}


#: Cases whose kind another case has.
REPEATED = ("two", "data", "a removed group", "a removed group with a class", "a callback that it lacks", "an option")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if what in REPEATED else ()) for what in REFUSED]
)
def test_a_change_is_refused_by_its_name(run: Run, what: str) -> None:
    overrides, reason = REFUSED[what]
    shown = run("fit", "run_dir=run", "resume=always", *overrides)
    assert shown.code == 2
    assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert re.search(reason, shown.err), shown.err


@pytest.mark.parametrize(
    "named", ["run_dir=run", pytest.param("ckpt=run/checkpoints/step-00000004.ckpt", marks=pytest.mark.slow)]
)
def test_an_evaluation_reads_keys_of_the_saved_data(run: Run, named: str) -> None:
    assert "data.path=dummy does not exist" in run("validate", named, "data.path=dummy").err
    assert "reached" in run("validate", named, "data.path=b.txt").err
    assert "Did you mean 'path'" in run("predict", named, "data.pth=b.txt").err
    assert "data is missing, and nothing works without it" in run("validate", named, "~data").err
    # A data module of the user's need not have a cache; the run's lies outside of its directory.
    assert "has no attribute 'Data'" in run("validate", named, "data=custom", "data._target_=small.Data").err


def test_interpolations_in_values_stay_text(run: Run) -> None:
    shown = run("fit", "run_dir=run", "resume=always", r"data.prompts=['\${seed}']")
    assert "(data.prompts: [] -> ['${seed}'])" in shown.err


def test_a_run_that_is_not_trusted_lists_no_changes_that_nobody_made(run: Run, tmp_path: Path) -> None:
    shutil.copytree("run", tmp_path / "copy")
    config = (tmp_path / "copy" / "config.yaml").read_text()
    foreign = config.replace("pkm_lightning.data.TextDataModule", "theirs.Data")
    assert foreign != config
    (tmp_path / "copy" / "config.yaml").write_text(foreign)
    shown = run("fit", f"run_dir={tmp_path / 'copy'}", "resume=always", "trainer.max_steps=99")
    assert re.search(r"names data\._target_=theirs\.Data, code .* repeat the command with trust_config=true", shown.err)
