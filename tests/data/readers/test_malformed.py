"""Damaged and hostile files: whatever is in them, they are read or end in one error that names the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkm_lightning.data.documents import Piece
from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.jsonl import JsonlReader
from pkm_lightning.data.readers.text import TextReader
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import DataError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXT = ("A story of several words, \u6f22\u5b57.\n\n" * 50).encode()
RECORDS = [
    {"text": "a \u2028 b", "id": 1},
    {"prompt": "Why?", "answer": "So.", "nested": {"a": [1, None]}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
#: What a mutation writes into a line.
BITS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b":",
    b"\\u",
    b"\\ud83d",
    b"null",
    b"9" * 400,
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"-",
    b"e9",
]


def end_of(pieces: Iterable[Piece], file: Path) -> str:
    """Returns the error in which the reading of a file ends, or "", if it is as it should be."""
    try:
        for piece in pieces:
            "".join(segment.text for segment in piece.segments).encode()
    except DataError as error:
        refusal = str(error)
    else:
        return ""
    assert file.name in refusal
    return refusal


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@FUZZ
@given(
    content=st.binary(max_size=80) | st.integers(0, len(TEXT)).map(lambda end: TEXT[:end]),
    ending=st.sampled_from(sorted(COMPRESSIONS)),
    separator=st.sampled_from([None, 1, 2]),
)
def test_any_bytes_are_text_or_named(tmp_path: Path, content: bytes, ending: str, separator: int | None) -> None:
    file = tmp_path / f"a.txt{ending}"
    file.write_bytes(COMPRESSIONS[ending](content))
    refusal = end_of(TextReader(str(file), endings=[".txt"], document_separator=separator).pieces(), file)
    assert refusal == "" if is_utf8(content) else "is not UTF-8 at byte" in refusal


@FUZZ
@given(ending=st.sampled_from([".gz", ".zst"]), place=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_to_compressed_files_is_named(tmp_path: Path, ending: str, place: float, bit: int, cut: bool) -> None:
    file = tmp_path / f"a.txt{ending}"
    # With checksums, as the programs gzip and zstd write them.
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if ending == ".zst" else gzip.compress
    content = bytearray(compress(TEXT))
    middle = int(place * (len(content) - 1))
    content[middle] ^= 1 << bit
    file.write_bytes(content[:middle] if cut else content)
    read: list[str] = []

    def pieces() -> Iterable[Piece]:
        for piece in TextReader(str(file), endings=[".txt"], document_separator=None).pieces():
            read.append(piece.segments[0].text)
            yield piece

    refusal = end_of(pieces(), file)
    # The header of a gzip file has bytes without a meaning for its text; an empty file has none at all.
    assert refusal or "".join(read).encode() == TEXT or (cut and middle == 0)


@FUZZ
@given(
    kind=st.integers(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.sampled_from(BITS)), min_size=1, max_size=3),
)
def test_mutated_records_are_read_or_named(tmp_path: Path, kind: int, edits: list[tuple[float, int, bytes]]) -> None:
    line = json.dumps(RECORDS[kind], ensure_ascii=False).encode()
    for place, removed, added in edits:
        at = int(place * len(line))
        line = line[:at] + added + line[at + removed :]
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(RECORDS[kind]).encode() + b"\n" + line)
    fields = Fields(text="text", prompt="prompt", answer="answer", messages="messages")
    reader = JsonlReader(str(file), endings=[".jsonl"], fields=fields, renderer=RENDERER)
    refusal = end_of(reader.pieces(), file)
    assert refusal == "" or "a.jsonl:" in refusal or "is not UTF-8 at byte" in refusal


class Kept(TemplateRenderer):
    """A renderer whose process serves all examples."""

    def close(self) -> None:
        """Keeps the process."""


RENDERER = Kept(
    "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    {"bos_token": "", "eos_token": ""},
    "a template",
)
