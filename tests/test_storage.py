"""What is written can be read back as it was, and folders are held by one process."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import IO

import pytest
import torch
from processes import held_elsewhere

from pkm_lightning import storage
from pkm_lightning.callbacks.recall import write_scores
from pkm_lightning.checkpoints.sharded import save
from pkm_lightning.compare.directory import held_directory
from pkm_lightning.compare.run_files import read_answers
from pkm_lightning.errors import DataError
from pkm_lightning.inference.recall import ItemScore
from pkm_lightning.storage import HeldFolder, csv_line, folder_written_beside, written_beside

TEXTS = ["plain", "", "a,b", 'say "x"', "one\rtwo", "one\ntwo", "one\r\ntwo", "\r", " \t", "ümlaut \u2028"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_of_csv_is_one_row_whatever_it_holds(text: str) -> None:
    line = csv_line(["before", text, 2.5])
    assert line.endswith("\n")
    assert not line.endswith("\r\n")
    assert list(csv.reader(io.StringIO(line + line, newline=""))) == [["before", text, "2.5"]] * 2


@pytest.mark.parametrize("answer", TEXTS)
def test_answers_of_an_untrained_model_are_read_back(tmp_path: Path, answer: str) -> None:
    score = ItemScore(
        form="seen", relation="all", decile=1, prompt="Who?", truth="He", answer=answer, exact=True, chosen=None,
        bits=1.0, prior_bits=3.0,
    )  # fmt: skip
    write_scores(tmp_path / "recall.csv", [score, score])
    answers = read_answers(tmp_path / "recall.csv")["seen"]
    assert answers.exact.tolist() == [True, True]
    assert answers.bits.tolist() == [2.0, 2.0]


def test_a_folder_is_held_by_one_process_and_withdrawn_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "folder"
    HeldFolder(folder).withdraw()
    assert list(tmp_path.iterdir()) == []
    held = HeldFolder(folder)
    (folder / "notes.txt").touch()
    held.withdraw()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    with held_elsewhere(folder), pytest.raises(BlockingIOError):
        HeldFolder(folder)


def test_a_lock_that_was_removed_in_between_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command removes its lock between the moments when this one opens and locks it."""
    hold, removed = storage.hold, list[bool]()

    def too_late(lock: IO[str]) -> bool:
        if not removed:
            (tmp_path / ".lock").unlink()
            removed.append(True)
        return hold(lock)

    monkeypatch.setattr(storage, "hold", too_late)
    held = HeldFolder(tmp_path)
    assert os.path.samestat(os.fstat(held._lock.fileno()), (tmp_path / ".lock").stat())
    held.close()


def test_a_refused_comparison_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError), held_directory(tmp_path / "deep" / "out"):
        raise DataError("no data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["file", "folder"])
@pytest.mark.parametrize("written", ["file", "folder", "parts of ranks"])
def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path, left: str, written: str) -> None:
    # One process writes a checkpoint as a file, several write a folder of the same name.
    path, beside = tmp_path / "step.ckpt", tmp_path / "step.ckpt.tmp"
    if left == "folder":
        beside.mkdir()
    (beside / "part" if left == "folder" else beside).write_bytes(b"half")
    if written == "file":
        with written_beside(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
    elif written == "folder":
        with folder_written_beside(path) as folder:
            (folder / "part").write_bytes(b"whole")
        assert [part.name for part in path.iterdir()] == ["part"]
    else:
        save({}, {"weight": torch.zeros(2)}, path)
        assert path.is_dir()
    assert not beside.exists()
