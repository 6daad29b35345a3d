"""The user's files: which are found, what else lies there, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.data.files import (
    check_paths,
    find_files,
    require_file,
    shown_endings,
    skipped_files,
)
from pkm_lightning.data.prompts import check_prompts, collect_prompts
from pkm_lightning.errors import ConfigError, DataError


def test_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028still one\x0b\x0c\x1c\x85\rone\r\n\r\n  two\0\n".encode())
    assert collect_prompts([], str(tmp_path / "p.txt")) == ["one\u2028still one\x0b\x0c\x1c\x85\rone", "  two\0"]


@pytest.mark.parametrize("value", [None, 7, 1000.0, True, ["a", "b"], {"a": 1}])
def test_prompts_that_are_not_texts_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompts holds .*; quote every text: 'data\.prompts=\[\"first\""):
        check_prompts(["good", value])


def test_prompts_of_broken_characters_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.prompts: .* holds \\udcff after 'a'"):
        check_prompts(["a\udcff"])


@pytest.mark.parametrize("path", ["", " ", None, 3, [], [""], ["a", None], ["a", ["b"]], {"a": 1}, True])
def test_paths_that_name_nothing_are_refused(path: object) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=.* names no files; give a file, a directory \(\. for"):
        check_paths("data.path", path)
    check_paths("data.path", ["a", "b"])


KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, and is read more than once"),
    "directory": (Path.mkdir, "is a directory"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "circular link": (lambda path: path.symlink_to(path), "cannot be read"),
    "nothing": (lambda path: None, "does not exist"),
    "long name": (lambda path: None, "cannot be read (File name too long)"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path, name: str) -> None:
    make, message = KINDS[name]
    path = tmp_path / ("x" * 300 if name == "long name" else "x")
    make(path)
    with pytest.raises(DataError) as refusal:
        require_file(f"data.tokenizer={path}", path, "do this")
    assert str(refusal.value) == f"data.tokenizer={path} {message}; do this." or name == "circular link"
    if name != "directory":
        with pytest.raises(DataError, match=r"data\.path=.* (is|does|cannot)"):
            find_files(str(path), [".txt"])


def test_files_of_other_endings_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.TXT", "deep/c.txt", "deep/d.py", "deep/e.py", "README", "z.txt.gz", "z.csv.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    assert [file.name for file in find_files(str(tmp_path), [".txt"])] == ["a.txt", "c.txt", "z.txt.gz"]
    assert shown_endings(skipped_files(str(tmp_path), [".txt"])) == "2 .py, 1 .TXT, 1 .csv.gz, 1 README"
    assert not skipped_files(str(tmp_path / "a.txt"), [".md"]), "a file that is named is read, whatever its ending"
    with pytest.raises(DataError, match=r"searched for \*\.jsonl, and this one holds 2 \.py, 2 \.txt, 1 \.TXT"):
        find_files(str(tmp_path), [".jsonl"])


def test_prepared_data_are_no_text(tmp_path: Path) -> None:
    """`out` may lie in the folder that is read, and a later call must find the same files."""
    names = ["a.json", "mine/a.json", ".mine.0123abcd.part/progress.json", ".mine.lock", "x.part/a.json", ".x/a.json"]
    prepared = ["out/shards.json", "out/manifest.json", "out/tokenizer.json"]
    for name in [*names, *prepared]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    found = [str(file.relative_to(tmp_path)) for file in find_files(str(tmp_path), [".json"])]
    assert found == [".x/a.json", "a.json", "mine/a.json", "x.part/a.json"]
    assert shown_endings(skipped_files(str(tmp_path), [".txt"])) == "4 .json"


def test_home_and_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/a.txt", "$HOME/a.txt", "${HOME}/*.txt"):
        assert find_files(path, [".txt"]) == [tmp_path / "a.txt"]


def test_a_null_character_in_a_path_is_refused() -> None:
    with pytest.raises(DataError, match=r"^'data\.path=a\\x00b' holds a null character, which no path does; give"):
        find_files("a\0b", [".txt"])
