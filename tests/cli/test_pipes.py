"""A pipe in a run directory, at which a process would wait for ever, is refused or passed over by whatever reads it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Run

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.cli.places import check_links
from pkm_lightning.cli.run_directory import RunDirectory, continues_run
from pkm_lightning.compare.comparison_file import read_comparison
from pkm_lightning.compare.report import check_place
from pkm_lightning.compare.run_files import read_answers, read_metrics, read_yaml
from pkm_lightning.compare.run_state import is_held, read_progress, read_record
from pkm_lightning.errors import CheckpointError, ConfigError, RunDirectoryError
from pkm_lightning.storage import open_regular


@pytest.fixture(autouse=True)
def _waits_no_longer_than_seconds() -> Iterator[None]:
    def fail(*_: Any) -> None:
        pytest.fail("it waits for the other end of a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [os.mkfifo, _socket, os.mkdir])
@pytest.mark.parametrize("mode", ["r", "rb", "a", "r+"])
def test_only_regular_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], mode: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "entry")
    with pytest.raises(OSError, match=r"not a file|[Ii]s a directory|No such device"):
        open_regular(tmp_path / "entry", mode)
    with open_regular(tmp_path / "file", "a") as file:
        file.write("text")
    assert open_regular(tmp_path / "file").read() == "text"
    assert (tmp_path / "file").stat().st_mode & 0o111 == 0


READERS: dict[str, tuple[str, Callable[[Path], object], object]] = {
    "record": ("run.json", lambda run: continues_run(run, "auto"), RunDirectoryError),
    "lock": (".lock", lambda run: RunDirectory(run, resume="auto"), RunDirectoryError),
    "configuration": ("config.yaml", lambda run: read_yaml(run / "config.yaml"), OSError),
    "report": ("run.json", read_record, {}),
    "state": (".lock", is_held, False),
    "progress": ("metrics.csv", read_progress, None),
    "metrics": ("metrics.csv", lambda run: read_metrics(run / "metrics.csv"), []),
    "answers": ("recall.csv", lambda run: read_answers(run / "recall.csv"), {}),
    "comparison": ("compare.json", read_comparison, RunDirectoryError),
    "earlier report": ("report.md", check_place, RunDirectoryError),
    "checkpoint": ("step.ckpt", lambda run: open_checkpoint(run / "step.ckpt"), CheckpointError),
    "exported": ("model.safetensors", lambda run: open_checkpoint(run / "model.safetensors"), CheckpointError),
    "skeleton": ("skeleton.pt", open_checkpoint, CheckpointError),
    "metadata": (".metadata", open_checkpoint, CheckpointError),
    "links": ("x.csv", check_links, ConfigError),
}


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_waits_for_a_pipe(tmp_path: Path, kind: str) -> None:
    name, read, expected = READERS[kind]
    torch.save({}, tmp_path / "skeleton.pt")
    (tmp_path / "skeleton.pt").unlink() if kind == "skeleton" else None
    os.mkfifo(tmp_path / name)
    if isinstance(expected, type):
        with pytest.raises(expected):
            read(tmp_path)
    else:
        assert read(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "verb", "reason"),
    [
        ("run.json", "fit", "run.json cannot be read (not a file)"),
        ("recall.csv", "fit", "recall.csv is neither a file nor a folder"),
        (".lock", "fit", ".lock is neither a file nor a folder"),
        ("test.json", "test", "test.json is neither a file nor a folder"),
        ("checkpoints/step-00000012.ckpt", "fit", "step-00000012.ckpt is neither a file nor a folder"),
        ("checkpoints/step-00000012.ckpt", "test", "step-00000012.ckpt is neither a file nor a folder"),
        ("checkpoints/step-00000012.ckpt", "export", "step-00000012.ckpt is damaged or no checkpoint"),
    ],
)
def test_a_command_names_the_pipe(cli: Run, trained: Path, name: str, verb: str, reason: str) -> None:
    (trained / name).unlink(missing_ok=True)
    os.mkfifo(trained / name)
    more = {"fit": ["resume=always"], "export": ["file=model.safetensors"]}
    shown = cli(verb, "run_dir=run", *more.get(verb, []))
    assert shown.code == 2, shown.err
    assert reason in shown.err
