"""Text files in pieces: the documents of the whole text, cut anywhere, compressed or not; every error has its byte."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from pkm_lightning.data.chunks import chunks
from pkm_lightning.data.documents import Piece
from pkm_lightning.data.readers import decoding
from pkm_lightning.data.readers import text as module
from pkm_lightning.data.readers.text import TextReader, split_documents
from pkm_lightning.errors import DataError

STORY = "".join(f"Sentence {i} has its own number, \u00e9\u6f22\U0001f600. " for i in range(6_000))


def reader(path: Path, document_separator: int | None = None) -> TextReader:
    return TextReader(str(path), endings=[".txt"], document_separator=document_separator)


def documents(pieces: Iterable[Piece]) -> list[str]:
    """Returns the documents that pieces make up."""
    whole, begun = [], ""
    for piece in pieces:
        begun += "".join(segment.text for segment in piece.segments)
        if piece.ends:
            whole.append(begun)
            begun = ""
    assert not begun
    return whole


def joined(parts: Iterable[tuple[str, bool]]) -> list[str]:
    whole, begun = [], ""
    for text, ends in parts:
        begun += text
        if ends:
            whole.append(begun)
            begun = ""
    assert not begun
    return whole


def plain_split(text: str, document_separator: int) -> list[str]:
    """Returns the documents of a whole text, by the rule as it is documented."""
    return re.split(rf"\n(?:[ \t\r]*\n){{{document_separator},}}", text)


@given(
    text=st.text(st.sampled_from("ab \n\r\t\u2028\x0c"), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    separator=st.integers(1, 3),
)
@example(text="a\n \n\n\nb", cuts=[2, 3, 4, 5], separator=2)
def test_documents_do_not_depend_on_where_blocks_end(text: str, cuts: list[int], separator: int) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    blocks = [text[a:b] for a, b in pairwise(places)]
    assert joined(split_documents(blocks, separator)) == plain_split(text, separator)
    assert joined(split_documents(blocks, None)) == [text]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_long_document_comes_in_the_chunks_of_the_whole(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20_000)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 7_001)
    content = ("\ufeff" + STORY).encode()
    compressed = {
        "": content,
        ".gz": gzip.compress(content[:100]) + gzip.compress(content[100:]),
        ".zst": zstandard.compress(content[:100]) + zstandard.compress(content[100:]),
    }
    (tmp_path / f"a.txt{ending}").write_bytes(compressed[ending])
    pieces = list(reader(tmp_path).pieces())
    assert [piece.segments[0].text for piece in pieces] == chunks(STORY, 20_000)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_documents_know_their_place_and_blank_ones_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\none\r\n\r\n\x0c\n\n two \n\n")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "d.py").write_text("x")
    made = reader(tmp_path, 1)
    for first, expected in ((0, ["one\r", " two ", "three"]), (1, ["three"])):
        pieces = list(made.pieces(first))
        assert documents(pieces) == expected
    assert [made.where(piece.file, piece.record) for piece in made.pieces()] == [
        f"{tmp_path}/a.txt, document 2",
        f"{tmp_path}/a.txt, document 4",
        f"{tmp_path}/c.txt, document 1",
    ]
    assert made.skipped == {"files of other endings: .py": 1, "blank documents": 2, "empty files": 1}, "counted once"
    assert reader(tmp_path).where(0, 0) == f"{tmp_path}/a.txt"


def test_white_space_of_any_length_is_left_out_or_kept_before_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CHUNK_CHARACTERS", 5_000)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 1_000)
    (tmp_path / "a.txt").write_text(" " * 20_000)
    assert list(reader(tmp_path).pieces()) == []
    (tmp_path / "a.txt").write_text(" " * 20_000 + "end" + "\n" * 20_000 + "more")
    first, second = documents(reader(tmp_path, 2).pieces())
    assert (first.strip(), second) == ("end", "more")
    assert 5_000 <= len(first) <= 5_000 + 2 * 1_000 + 3


def test_a_gigabyte_of_zeros_in_a_megabyte_is_read_a_block_at_a_time(tmp_path: Path) -> None:
    def largest(blocks: Iterator[str]) -> int:
        return max(len(block) for block, _ in zip(blocks, range(40), strict=False))

    zeros = bytes(2**20) * 160
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(zeros, 1))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(zeros))
    assert largest(decoding.text_blocks(tmp_path / "a.txt.gz")) <= 2**20
    assert largest(decoding.text_blocks(tmp_path / "a.txt.zst")) <= 2**27


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("a.txt", b"ab\xff", r"a\.txt is not UTF-8 at byte 2; convert it, for example with iconv"),
    "cut within a character": ("a.txt", b"ab\xe6\xbc", r"a\.txt is not UTF-8 at byte 2"),
    "late": ("a.txt", b"\xc3\xa9" * 2**19 + b"\xe6\xbc" + b"\xff", rf"a\.txt is not UTF-8 at byte {2**20};"),
    "within gzip": ("a.txt.gz", gzip.compress(b"ab\xff"), r"a\.txt\.gz is not UTF-8 at byte 2 of its text"),
    "within zstd": ("a.txt.zst", zstandard.compress(b"ab\xff"), r"a\.txt\.zst is not UTF-8 at byte 2 of its text"),
    "gzip that ends early": ("a.txt.gz", gzip.compress(STORY.encode())[:-9], r"a\.txt\.gz ends in the middle; check"),
    "zstd that ends early": ("a.txt.zst", zstandard.compress(STORY.encode())[:-9], r"zst ends in the middle; check"),
    "a name that lies about gzip": ("a.txt.gz", b"text", r"a\.txt\.gz is damaged \(Not a gzipped file \(b'te'\)\)"),
    "a name that lies about zstd": ("a.txt.zst", b"text", r"a\.txt\.zst is damaged \(.*\); check it with zstd -t"),
    "gzip without its name": ("a.txt", gzip.compress(b"text"), r"byte 1; it begins as a gzip file; name it \.gz"),
    "zstd without its name": ("a.txt", zstandard.compress(b"text"), r"it begins as a Zstandard file; name it \.zst"),
    "an archive": ("a.txt", b"PK\x03\x04\xff", r"it begins as a zip file; unpack it"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_named_with_the_place(tmp_path: Path, name: str) -> None:
    file, content, message = MALFORMED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(reader(tmp_path).pieces())
