"""Files written beside and renamed: through links, into pipes and devices, never half, never over a folder."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from pkm_lightning.errors import ConfigError, RunDirectoryError
from pkm_lightning.storage import check_target, is_stream, write_beside, written_beside


def test_a_link_stays_a_link_and_what_it_points_to_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "answers.jsonl"
    target.write_text("old")
    target.chmod(0o640)
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "real" / "new.jsonl")
    write_beside(link, "new")
    write_beside(dangling, "first")
    assert (link.is_symlink(), dangling.is_symlink()) == (True, True)
    assert (target.read_text(), dangling.read_text()) == ("new", "first")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["answers.jsonl", "dangling", "link", "new.jsonl", "real"]


def test_a_pipe_passes_everything_on_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_beside(pipe, "line\n" * 30_000)  # more than a pipe holds
    reader.join(timeout=30)
    assert read == ["line\n" * 30_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_standard_output_in_a_file_is_continued_and_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    kept = os.dup(1)
    with output.open("wb") as file:
        file.write(b"before\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        try:
            streams = is_stream(Path("/dev/stdout"))
            write_beside(Path("/dev/stdout"), "answers\n")
            os.write(1, b"after\n")
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    assert streams
    assert output.read_text() == "before\nanswers\nafter\n"
    assert list(tmp_path.iterdir()) == [output]


def test_a_device_stays_a_device_and_a_full_one_is_one_sentence() -> None:
    write_beside(Path("/dev/null"), "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(RunDirectoryError, match=r"/dev/full cannot be written \(No space left on device\)"):
        write_beside(Path("/dev/full"), "x" * 10**6)


def test_a_folder_is_refused_and_an_error_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunDirectoryError, match="folder cannot be written"):
        write_beside(tmp_path / "folder", "x")
    with pytest.raises(KeyError), written_beside(tmp_path / "file"):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "out=.*/folder is a folder; give the name of a file"),
        ("missing/x.jsonl", "the folder .*/missing does not exist; make it first"),
        ("to_missing", "the folder .*/missing does not exist"),
        ("to_folder", "to_folder is a folder"),
    ],
)
def test_a_target_is_refused_before_the_work(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_missing").symlink_to(tmp_path / "missing" / "x.jsonl")
    (tmp_path / "to_folder").symlink_to(tmp_path / "folder")
    with pytest.raises(ConfigError, match=reason):
        check_target("out", tmp_path / name)


def test_a_target_that_can_be_written_is_accepted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path in (tmp_path / "new", tmp_path / "file", tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        check_target("out", path)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="cannot be written; choose another place"):
        check_target("out", tmp_path / "x")
