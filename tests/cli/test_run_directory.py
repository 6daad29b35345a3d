"""The files of a run directory while runs in it are begun, accepted, refused and killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.cli import run_directory
from pkm_lightning.cli.run_directory import RunDirectory, continues_run
from pkm_lightning.errors import RunDirectoryError

CONFIG: dict[str, Any] = {"model": {}, "ffn": {"_target_": "new"}}
STARTED = {"status": "running"}
OF_EVALUATIONS = ("validate.json", "test.json", "predictions.jsonl")
UNFINISHED = ("config.yaml.tmp", "run.json.tmp", "metrics.csv.tmp")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A finished run."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    files = ("metrics.csv", "checkpoints/step-00000004.ckpt", ".lock", "notes.txt", *OF_EVALUATIONS)
    for name in files:
        (run / name).write_text(f"earlier {name}")
    (run / "config.yaml").write_text("model: {}\nffn: {}\n")
    (run / "run.json").write_text(json.dumps({"status": "finished", "tokens": 5}))
    return run


def test_a_run_takes_the_place_of_an_earlier_one_when_it_is_accepted(earlier: Path) -> None:
    directory = RunDirectory(earlier, resume="never")
    directory.begin(CONFIG)
    assert not (earlier / "metrics.csv").exists()
    directory.accept(CONFIG, STARTED)
    directory.close()
    assert set(content(earlier)) == {".lock", "notes.txt", "config.yaml", "run.json"}


@pytest.mark.parametrize("n_renamed", range(8))
@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_an_earlier_run_is_whole_after_any_end_before_that(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, ends: str, n_renamed: int
) -> None:
    """The end comes after some renames, or (7) after the new run has written its first files."""
    before = content(earlier)
    directory = RunDirectory(earlier, resume="never")
    with monkeypatch.context() as interrupted:
        if n_renamed < 7:
            left = iter([True] * n_renamed)
            rename = os.replace
            interrupted.setattr(run_directory.os, "replace", lambda a, b: next(left) and rename(a, b))
            with pytest.raises(StopIteration):
                directory.begin(CONFIG)
        else:
            directory.begin(CONFIG)
            (earlier / "tensorboard").mkdir()
            for name in UNFINISHED:
                (earlier / name).touch()
    if ends == "refused":
        directory.close()
        assert content(earlier) == before
    else:
        directory._held.close()  # all that a kill does
    with pytest.raises(RunDirectoryError, match="a run that finished"):
        RunDirectory(earlier, resume="auto")
    assert content(earlier) == before


def test_a_kill_after_the_acceptance_leaves_the_new_run(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(earlier, resume="never")
    directory.begin(CONFIG)
    with monkeypatch.context() as killed:
        killed.setattr(directory, "_forget_earlier", lambda: None)
        directory.accept(CONFIG, STARTED)
        directory._held.close()
    again = RunDirectory(earlier, resume="auto")
    assert again.resumes
    assert again.record == STARTED
    again.close()
    assert set(content(earlier)) == {".lock", "notes.txt", "config.yaml", "run.json"}


@pytest.mark.parametrize("exists", [True, False])
def test_what_was_not_there_is_removed(tmp_path: Path, exists: bool) -> None:
    run = tmp_path / "some" / "run"
    if exists:
        run.mkdir(parents=True)
    directory = RunDirectory(run, resume="auto")
    directory.begin(CONFIG)
    (run / "tensorboard").mkdir()
    directory.close()
    assert list(tmp_path.rglob("*")) == ([run.parent, run] if exists else [])


def test_a_run_killed_at_its_start_starts_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resume="auto")
    directory.begin(CONFIG)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.csv").write_text("step,tokens\n")
    directory._held.close()
    again = RunDirectory(tmp_path, resume="auto")
    assert not again.resumes
    again.close()


RECORDS: dict[str, tuple[str, dict[str, bool | str]]] = {
    "running": ('{"status": "running"}', {"auto": True, "always": True, "never": False}),
    "interrupted": ('{"status": "interrupted"}', {"auto": True, "always": True, "never": False}),
    "finished": ('{"status": "finished"}', {"auto": "that finished", "always": True, "never": False}),
    "failed": ('{"status": "failed", "tokens": 5}', {"auto": "that failed", "always": True, "never": False}),
    "failed before training": (
        '{"status": "failed", "tokens": 0}',
        {"auto": "that failed", "always": True, "never": False},  # this one has a checkpoint
    ),
    "cut short": ('{"status": "fin', {"auto": "run.json is damaged", "always": True, "never": False}),
    "empty": ("", {"auto": "run.json is damaged", "always": True, "never": False}),
    "of another kind": ("[1]", {"auto": "run.json is damaged", "always": True, "never": False}),
    "an unknown status": ('{"status": 3}', {"auto": "run.json is damaged", "always": True, "never": False}),
    "nested": ("[" * 100_000, {"auto": "run.json is damaged", "always": True, "never": False}),
    "bytes": ("\udcff\udcfe", {"auto": "run.json is damaged", "always": True, "never": False}),
}


@pytest.mark.parametrize("what", RECORDS)
def test_what_each_record_allows(earlier: Path, what: str) -> None:
    text, allowed = RECORDS[what]
    (earlier / "run.json").write_text(text, errors="surrogateescape")
    for resume, expected in allowed.items():
        if isinstance(expected, bool):
            assert continues_run(earlier, resume) is expected
        else:
            with pytest.raises(RunDirectoryError, match=rf"{expected}; .*resume=always.*resume=never"):
                continues_run(earlier, resume)


@pytest.mark.parametrize("resume", ["auto", "always", "never"])
def test_a_foreign_run_json_is_left_alone(tmp_path: Path, resume: str) -> None:
    (tmp_path / "run.json").write_text('{"command": "sprint"}')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunDirectoryError, match=r"run\.json is not a record of a run; choose another run_dir"):
        RunDirectory(tmp_path, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "checkpoints"}


def test_a_failed_run_without_a_checkpoint_is_replaced(earlier: Path) -> None:
    (earlier / "run.json").write_text('{"status": "failed", "tokens": 0}')
    (earlier / "checkpoints" / "step-00000004.ckpt").unlink()
    assert continues_run(earlier, "auto") is continues_run(earlier, "always") is False
