"""The user's files: which are found, what else lies there, and how lines and records are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.data.files import (
    check_paths,
    find_files,
    read_documents,
    read_records,
    require_file,
    shown_endings,
    skipped_files,
    text_field,
)
from pkm_lightning.data.prompts import check_prompts, collect_prompts
from pkm_lightning.errors import ConfigError, DataError


def in_quotes(text: str) -> bytes:
    return b'{"text": "' + text.encode() + b'"}'


#: Lines of a .jsonl and the texts that they hold.
READABLE: dict[str, tuple[bytes, list[str]]] = {
    "carriage returns": (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    "a byte order mark": (b'\xef\xbb\xbf{"text": "a"}', ["a"]),
    "other ends of lines": (in_quotes("a\u2028b\u2029c\u0085d"), ["a\u2028b\u2029c\u0085d"]),
    "escaped ends of lines": (b'{"text": "a\\u2028b\\u000bc\\nd"}', ["a\u2028b\x0bc\nd"]),
    "an escaped NUL": (b'{"text": "a\\u0000b"}', ["a\0b"]),
    "a pair of surrogates": (b'{"text": "a \\ud83d\\ude00"}', ["a \U0001f600"]),
    "a number of 5,000 digits": (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", ["a"]),
    "no numbers": (b'{"text": "a", "x": NaN, "y": -Infinity, "z": 1e999}', ["a"]),
    "surrogates elsewhere": (b'{"text": "a", "other": "\\ud83d"}', ["a"]),
    "repeated keys elsewhere": (b'{"text": "a", "other": {"b": 1, "b": 2}}', ["a"]),
}


@pytest.mark.parametrize("name", READABLE)
def test_records_are_read_as_they_are_written(tmp_path: Path, name: str) -> None:
    content, texts = READABLE[name]
    (tmp_path / "r.jsonl").write_bytes(content)
    assert [text_field(*pair, "text") for pair in read_records(tmp_path / "r.jsonl")] == texts


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "half a character": (b'{"text": "hello \\ud83d world"}', r"r\.jsonl:1: field 'text' holds \\ud83d after 'hello '"),
    "the other half": (b'{"text": "a"}\r\n{"text": "\\ude00"}', r"r\.jsonl:2: field 'text' holds \\ude00 after ''"),
    "a field twice": (b'{"text": "a", "text": "b"}', r"r\.jsonl:1 has the field 'text' more than once"),
    "a raw NUL": (b'{"text": "a\0b"}', r"r\.jsonl:1 is not JSON \(Invalid control character at\)"),
    "too deep": (b'{"text": ' + b"[" * 100_000, r"r\.jsonl:1 is nested too deeply"),
    "a number": (b"9" * 5000, r"r\.jsonl:1 is a JSON number"),
    "a text": (b'"a"', r"r\.jsonl:1 is a JSON text"),
    "null": (b"null", r"r\.jsonl:1 is a JSON null"),
    "two objects": (b'{"text": "a"} {"text": "b"}', r"r\.jsonl:1 is not JSON \(Extra data\)"),
    "an object as text": (b'{"text": {"a": 1}}', r"r\.jsonl:1: field 'text' is not text"),
    "a number as text": (b'{"text": 12}', r"r\.jsonl:1: field 'text' is not text"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), r"r\.jsonl is not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_records_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        [text_field(*pair, "text") for pair in read_records(tmp_path / "r.jsonl")]


def test_documents_and_prompts_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028still one\x0b\x0c\x1c\x85\rone\r\n\r\n  two\0\n".encode())
    assert collect_prompts([], str(tmp_path / "p.txt")) == ["one\u2028still one\x0b\x0c\x1c\x85\rone", "  two\0"]
    (tmp_path / "d.txt").write_bytes("one\u2029\u2029still one\r\n\r\ntwo\n \t\nthree".encode())
    assert read_documents(tmp_path / "d.txt", 1) == ["one\u2029\u2029still one\r", "two", "three"]


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
    for name in ("a.txt", "b.TXT", "deep/c.txt", "deep/d.py", "deep/e.py", "README", "z.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    assert [file.name for file in find_files(str(tmp_path), [".txt"])] == ["a.txt", "c.txt"]
    assert shown_endings(skipped_files(str(tmp_path), [".txt"])) == "2 .py, 1 .TXT, 1 .gz, 1 README"
    assert not skipped_files(str(tmp_path / "a.txt"), [".md"]), "a file that is named is read, whatever its ending"
    with pytest.raises(DataError, match=r"searched for \*\.jsonl, and this one holds 2 \.py, 2 \.txt, 1 \.TXT"):
        find_files(str(tmp_path), [".jsonl"])


def test_home_and_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/a.txt", "$HOME/a.txt", "${HOME}/*.txt"):
        assert find_files(path, [".txt"]) == [tmp_path / "a.txt"]
