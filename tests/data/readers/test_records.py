"""Lines of JSON: what is read as it is written, and what is named with its line."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.documents import Piece, Segment, question_of
from pkm_lightning.data.readers import records as module
from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.jsonl import JsonlReader
from pkm_lightning.data.readers.records import read_lines, read_records, text_field
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import DataError

FIELDS = Fields(text="text", prompt="prompt", answer="answer", messages="messages")


def reader(path: Path) -> JsonlReader:
    renderer = TemplateRenderer("", {"bos_token": "", "eos_token": "<eos>"}, "none")
    return JsonlReader(str(path), endings=[".jsonl"], fields=FIELDS, renderer=renderer)


def texts_of(file: Path) -> list[str]:
    return [text_field(f"{file}:{line}", record, "text") for line, record in read_records(file)]


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
    assert texts_of(tmp_path / "r.jsonl") == texts


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
        texts_of(tmp_path / "r.jsonl")


@given(text=st.text(st.sampled_from("ab\n\r\u2028\x0b"), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_lines_do_not_depend_on_where_blocks_end(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    blocks = [text[a:b] for a, b in pairwise(places)]
    *whole, last = text.split("\n")
    assert list(read_lines(blocks, "a")) == [*(line.removesuffix("\r") for line in whole), last]


def test_a_line_without_an_end_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_CHARACTERS", 1_000)
    endless: Any = iter(["a\nb\nc", *["c" * 300] * 4, None])
    with pytest.raises(DataError, match=r"^a:3 has more than 1,000 characters; write one object per line"):
        list(read_lines(endless, "a"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_the_first_record_decides_what_all_of_them_are(tmp_path: Path, ending: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(b'\n{"prompt": " Why? ", "answer": "So.\\n", "text": "x"}'))
    (tmp_path / f"b.jsonl{ending}").write_bytes(compress(b'{"prompt": "p", "answer": "a"}\r\n{"text": "a"}'))
    made = reader(tmp_path)
    pieces = made.pieces()
    first = next(pieces)
    assert first == Piece(0, 1, (Segment("Why?", learned=False), Segment(" So.")))
    assert question_of(first) == ("Why?", "So.")
    assert made.where(0, 1) == f"{tmp_path}/a.jsonl{ending}:2"
    next(pieces)
    with pytest.raises(DataError, match=rf"b\.jsonl{ending}:2: field 'prompt' is missing \(fields present: text\)"):
        next(pieces)
    assert [piece.record for piece in reader(tmp_path / f"a.jsonl{ending}").pieces()] == [1]


def test_texts_are_documents_that_are_learned_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": " a ", "prompt": "b"}')
    made = reader(tmp_path)
    assert list(made.pieces()) == [Piece(1, 0, (Segment("a"),))]
    assert made.skipped == {"empty files": 1}


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"data\.path=.* is empty; write one JSON object per line"):
        list(reader(tmp_path).pieces())
