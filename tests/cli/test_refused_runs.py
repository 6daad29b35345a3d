"""A refused command changes nothing: neither an earlier run, nor a directory that was not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Run, record

from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.cli import fit
from pkm_lightning.cli.resume import differences
from pkm_lightning.errors import CheckpointWriteError

MODEL = [
    "model.n_layers=1", "model.dim=32", "model.ffn_dim=32", "model.n_heads=2", "model.n_kv_heads=2",
    "model.memory.n_keys=16", "trainer.max_steps=4", "data.tokenizer=bytes", "data.seq_len=128",
    "data.global_batch_size=4", "callbacks=none", "callbacks=[metrics_csv,step_checkpoint]",
    "callbacks.step_checkpoint.every_n_steps=2", "logger=none",
]  # fmt: skip
COMMAND = ["fit", *MODEL, "data=jsonl", "data.path=data.jsonl", "run_dir=run"]
LINES = "".join(json.dumps({"prompt": f"What is {i} plus one?", "answer": str(i + 1)}) + "\n" for i in range(60))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text(LINES)
    return tmp_path / "data.jsonl"


@pytest.fixture
def ended(cli: Run, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of COMMAND, trained once a worker and copied for each test."""
    kept = tmp_path_factory.getbasetemp() / "ended-run"
    if not kept.exists():
        assert cli(*COMMAND).code == 0
        shutil.copytree(tmp_path / "run", kept)
    shutil.copytree(kept, tmp_path / "run", dirs_exist_ok=True)
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_status(run: Path, status: str, **fields: Any) -> None:
    (run / "run.json").write_text(json.dumps({**record(run), "status": status, **fields}))


def append_a_line(run: Path, data: Path) -> None:
    data.write_text(LINES + '{"prompt": "One more?", "answer": "yes"}\n')


def break_a_line(run: Path, data: Path) -> None:
    data.write_text(LINES + '{"prompt": \n')


def remove_the_data(run: Path, data: Path) -> None:
    """As where the command is given in another working directory."""
    data.unlink()


def remove_a_tensor(run: Path, data: Path) -> None:
    path = latest_checkpoint(run)
    assert path is not None
    saved = torch.load(path, weights_only=False)
    saved["state_dict"].popitem()
    torch.save(saved, path)


def cut_the_checkpoint(run: Path, data: Path) -> None:
    path = latest_checkpoint(run)
    assert path is not None
    path.write_bytes(path.read_bytes()[:10_000])


DAMAGES = [
    (append_a_line, "finished"),
    (break_a_line, "interrupted"),
    (remove_the_data, "interrupted"),
    (remove_a_tensor, "finished"),
    (cut_the_checkpoint, "interrupted"),
]


@pytest.mark.parametrize(("damage", "status"), DAMAGES)
def test_a_refused_resume_leaves_all_records(
    cli: Run, ended: Path, data: Path, damage: Callable[[Path, Path], None], status: str
) -> None:
    set_status(ended, status)
    damage(ended, data)
    before = content(ended)
    assert cli(*COMMAND, *(["resume=always"] if status == "finished" else [])).code == 2
    assert content(ended) == before
    assert record(ended)["metrics"]["test/loss"] > 0


def test_a_resume_goes_on_when_the_mistake_is_mended(cli: Run, ended: Path, data: Path) -> None:
    set_status(ended, "interrupted")
    break_a_line(ended, data)
    assert cli(*COMMAND).code == 2
    data.write_text(LINES)
    assert cli(*COMMAND).code == 0
    assert record(ended)["status"] == "finished"


def test_earlier_metrics_stay_when_a_continued_run_fails(
    cli: Run, ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ArithmeticError("numbers went wrong")

    before = record(ended)
    monkeypatch.setattr(fit, "_test", broken)
    with pytest.raises(ArithmeticError):
        cli(*COMMAND, "resume=always")
    after = record(ended)
    assert after["status"] == "failed"
    for key in ("metrics", "tokens", "best_validation", "started"):
        assert after[key] == before[key], key
    assert after["seconds"]["total"] > before["seconds"]["total"]


TEXT = ["data=text", "data.path=data.txt"]
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "a typo": (LINES + '{"prompt": \n', LINES, []),
    "no records": ("", LINES, []),
    "not UTF-8": ("\udcff", LINES, []),
    "too little text": ("word " * 40, "word " * 4000, TEXT),
    "a batch that does not divide": (LINES, LINES, ["trainer.accumulate_grad_batches=3"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_leaves_no_directory_and_no_lock_out(cli: Run, tmp_path: Path, mistake: str) -> None:
    broken, mended, overrides = MISTAKES[mistake]
    file = tmp_path / ("data.txt" if overrides == TEXT else "data.jsonl")
    file.write_text(broken, errors="surrogateescape")
    command = [*COMMAND[:-1], *overrides, "run_dir=deep/in/run"]
    refused = cli(*command)
    assert refused.code == 2, refused
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if mistake == "a typo":
        file.write_text(mended)
        assert cli(*command).code == 0
        assert record(tmp_path / "deep" / "in" / "run")["status"] == "finished"


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_refused_replacement_leaves_the_earlier_run(cli: Run, ended: Path, resume: str) -> None:
    if resume == "auto":  # a run that failed before it trained is replaced without being asked
        shutil.rmtree(ended / "checkpoints")
        set_status(ended, "failed", tokens=0)
    before = content(ended)
    # Lightning sets the data up, and finds that the batch does not divide, after rank 0 has made room.
    assert cli(*COMMAND, f"resume={resume}", "trainer.accumulate_grad_batches=3").code == 2
    assert content(ended) == before


def test_a_run_that_failed_before_it_trained_is_started_by_the_same_command(cli: Run, data: Path) -> None:
    plugin = data.parent / "mistaken.py"
    plugin.write_text(
        "from pkm_lightning.ffn import Dense\n"
        "class Mistaken(Dense):\n"
        "    def forward(self, x, context):\n"
        "        if x.device.type != 'meta':\n"
        "            raise ArithmeticError('numbers went wrong')\n"
        "        return super().forward(x, context)\n"
    )
    command = [*COMMAND, "ffn=dense", "ffn._target_=mistaken.Mistaken"]
    with pytest.raises(ArithmeticError):
        cli(*command)
    run = data.parent / "run"
    assert record(run)["status"] == "failed"
    assert not record(run)["tokens"]
    assert cli(*COMMAND, "ffn=dense").code == 0
    assert record(run)["status"] == "finished"


@pytest.mark.parametrize("place", ["checkpoint", "rows"])
def test_a_full_disk_interrupts(cli: Run, data: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "file") if place == "rows" else CheckpointWriteError("full")

    where = {
        "checkpoint": "pkm_lightning.checkpoints.atomic.AtomicCheckpointIO.save_checkpoint",
        "rows": "pkm_lightning.callbacks.metrics_csv.MetricsCSV._append",
    }
    with monkeypatch.context() as disk:
        disk.setattr(where[place], full)
        assert cli(*COMMAND, "trainer.log_every_n_steps=1").code == 2
    run = data.parent / "run"
    assert record(run)["status"] == "interrupted"
    assert record(run)["reason"]
    assert cli(*COMMAND, "trainer.log_every_n_steps=1").code == 0
    assert record(run)["status"] == "finished"


@pytest.mark.parametrize("resume", ["always", "never"])
def test_a_damaged_record_is_refused_with_advice_that_works(cli: Run, ended: Path, resume: str) -> None:
    whole = (ended / "run.json").read_text()
    (ended / "run.json").write_text(whole[: len(whole) // 2])
    refused = cli(*COMMAND)
    assert refused.code == 2
    assert "resume=always" in refused.err
    assert "resume=never" in refused.err
    assert cli(*COMMAND, f"resume={resume}").code == 0
    assert record(ended)["status"] == "finished"


SAMPLES = {"_target_": "pkm_lightning.callbacks.Samples", "path": "x", "tokens": 4}


@pytest.mark.parametrize(
    ("saved", "new", "shown"),
    [
        ({"a": {"s": SAMPLES}}, {"a": {}}, ["a.s: pkm_lightning.callbacks.Samples -> (absent)"]),
        ({"a": {"s": SAMPLES}}, {"a": {"s": None}}, ["a.s: pkm_lightning.callbacks.Samples -> None"]),
        ({"a": {}}, {"a": {"s": {"x": 1, "y": 2}}}, ["a.s: (absent) -> {...}"]),
        ({"a": {"s": SAMPLES}}, {"a": {"s": {**SAMPLES, "tokens": 5}}}, ["a.s.tokens: 4 -> 5"]),
        ({"run_dir": "a", "trainer": {"devices": 1}}, {"run_dir": "b", "trainer": {"devices": 2}}, []),
        ({"strategy": None}, {"strategy": {"_target_": "x"}}, []),
    ],
)
def test_a_group_that_one_side_lacks_is_one_difference(
    saved: dict[str, Any], new: dict[str, Any], shown: list[str]
) -> None:
    assert differences(saved, new) == shown
