"""Runs beside a frozen table: drawn, or in a file that every command needs again.

Letters: N rows, V values per row.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import assert_equal_runs, last_checkpoint
from small import Outcome, Run, resolved
from stored_files import write_tensors

import pkm_lightning
from pkm_lightning.checkpoints.safetensors import read_entries
from pkm_lightning.errors import CheckpointError

# On one worker, so that the run of the module is trained once.
pytestmark = pytest.mark.xdist_group("frozen_tables")

MODEL = [
    "ffn=engram", "ffn.rows=40", "ffn.heads=1", "ffn.row_dim=8", "placement.layers=[0]", "model.n_layers=2",
    "model.dim=16", "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2", "table.trainable=false",
]  # fmt: skip
RUN = [
    *MODEL, "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4",
    "callbacks=[metrics_csv,step_checkpoint]", "trainer.max_steps=9", "trainer.val_check_interval=3", "logger=none",
    "+callbacks.interrupt._target_=toys.InterruptOnce", "trust_config=true",
]  # fmt: skip
FILE = ["table.path=rows.safetensors", "table.device=mmap"]
NAME = "model.tables.0.weight"


@pytest.fixture(scope="module")
def of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, since runs hold the absolute path of the file."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "a.txt").write_text("a cat sat on the mat and saw a dog run by . " * 60)
    (table,) = resolved(*MODEL).model.tables
    torch.manual_seed(1)
    write_tensors(folder / "kept.safetensors", {"rows": torch.randn(table.rows, table.dim).bfloat16()})  # type: ignore[call-overload]
    return folder


@pytest.fixture
def files(of_module: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A text and the rows of a table in the working directory."""
    monkeypatch.chdir(of_module)
    shutil.copy("kept.safetensors", "rows.safetensors")
    return cli


@pytest.fixture
def run(files: Run) -> Run:
    """A run beside the rows of a file, in `run`, trained once."""
    if not Path("run").exists():
        shown = files("fit", *RUN, *FILE, "run_dir=run")
        assert shown.code == 0, shown.err
    return files


@pytest.mark.parametrize("where", [pytest.param("drawn", marks=pytest.mark.slow), "file"])
def test_a_run_that_was_interrupted_ends_like_another(run: Run, where: str) -> None:
    whole, cut = Path("run" if where == "file" else "drawn"), Path(where, "cut")
    options = [*RUN, *(FILE if where == "file" else [])]
    if where == "drawn":
        assert run("fit", *options, f"run_dir={whole}").code == 0
    Path("interrupt").touch()
    assert run("fit", *options, f"run_dir={cut}").code == 130
    assert last_checkpoint(cut)["global_step"] == 7
    resumed = run("fit", f"run_dir={cut}", "trust_config=true")
    assert resumed.code == 0, resumed.err
    assert_equal_runs(whole, cut)
    checkpoint = last_checkpoint(whole)
    assert (NAME in checkpoint["state_dict"]) == (where == "drawn")
    assert not any(group["name"] == "table" for group in checkpoint["optimizer_states"][0]["param_groups"])


def figures(shown: Outcome) -> list[list[str]]:
    """Returns the lines of a table of metrics."""
    assert shown.code == 0, shown.err
    found = [line.split()[1:4] for line in shown.out.splitlines() if "test/" in line]
    assert found
    return found


def test_an_export_holds_the_rows_and_answers_as_the_run(run: Run) -> None:
    asked = ["generate", "prompt=a cat", "max_new_tokens=8", "trust_config=true"]
    answer = run(*asked, "run_dir=run").out
    loss = figures(run("test", "run_dir=run", "trust_config=true"))
    assert figures(run("test", "run_dir=run", "trust_config=true", "table.device=cpu")) == loss
    assert run("export", "run_dir=run", "file=all.safetensors").code == 0
    rows = read_entries(Path("rows.safetensors"))["rows"]
    exported = read_entries(Path("all.safetensors"))["tables.0.weight"]
    assert (exported.shape, exported.dtype) == (rows.shape, torch.bfloat16)
    values = [
        Path(name).read_bytes()[entry.start : entry.start + entry.n_bytes]
        for name, entry in (("all.safetensors", exported), ("rows.safetensors", rows))
    ]
    assert values[0] == values[1]
    refused = run("export", "run_dir=run", "file=b.safetensors", "table.device=cpu")
    assert "export reads no key of table but table.path" in refused.err
    Path("rows.safetensors").unlink()
    assert run(*asked, "ckpt=all.safetensors").out == answer
    assert figures(run("test", "ckpt=all.safetensors", "trust_config=true")) == loss
    gone = run("export", "run_dir=run", "file=b.safetensors")
    assert "rows.safetensors cannot be read (No such file or directory)" in gone.err


@pytest.mark.slow
def test_a_file_that_has_moved_is_named_and_one_that_has_changed_refused(run: Run, of_module: Path) -> None:
    start = ["fit", "init_from=run", "run_dir=new", *RUN[len(MODEL) :], "trainer.max_steps=1", "trust_config=true"]
    trust = "trust_config=true"
    asked = ["generate", "run_dir=run", "prompt=a", "max_new_tokens=2", trust]
    export = ["export", "run_dir=run", "file=new.safetensors", "overwrite=true"]
    original = Path("rows.safetensors").rename("moved.safetensors")
    for verb in (["fit", "run_dir=run", "resume=always", trust], asked):
        shown = run(*verb)
        assert shown.code == 2, verb
        assert f"{of_module}/rows.safetensors cannot be read (No such file or directory)" in shown.err, verb
        assert len(shown.err.splitlines()) == 1
    write_tensors(Path("rows.safetensors"), {"rows": torch.zeros(read_entries(original)["rows"].shape).bfloat16()})
    for verb in (["fit", "run_dir=run", "resume=always", trust], asked, start, export, ["test", "run_dir=run", trust]):
        shown = run(*verb)
        assert shown.code == 2, verb
        assert "rows.safetensors holds other rows than those that" in shown.err, verb
        assert len(shown.err.splitlines()) == 1
    assert not Path("new").exists()
    for verb in (start, asked, export):
        shown = run(*verb, "table.path=moved.safetensors")
        assert shown.code == 0, (verb, shown.err)


def test_programs_load_it_and_learning_tables_begin_with_the_rows(run: Run) -> None:
    loaded = pkm_lightning.load("run", trust_config=True)
    (table,) = loaded.model.tables
    assert table.stored is not None
    folder = shutil.move("rows.safetensors", "moved.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        pkm_lightning.load("run", trust_config=True)
    again = pkm_lightning.load("run", trust_config=True, table_path=folder, table_device="cpu")
    ids_TK = torch.tensor([[0, table.rows - 1]])  # type: ignore[operator]
    assert torch.equal(again.model.tables[0].gather(ids_TK), table.gather(ids_TK))  # type: ignore[operator]
    learning = [*RUN, "table.trainable=true", f"table.path={folder}", "optim.lr=0", "optim.warmup_share=0"]
    assert run("fit", *learning, "trainer.max_steps=1", "trainer.val_check_interval=1", "run_dir=learning").code == 0
    Path(folder).unlink()
    state = last_checkpoint(Path("learning"))["state_dict"]
    assert torch.equal(state[NAME], again.model.tables[0].weight)
    assert run("test", "run_dir=learning", "trust_config=true").code == 0
