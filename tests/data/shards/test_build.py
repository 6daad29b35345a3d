"""A build of shards holds every document once; whatever interrupts it, it ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_corpus import line_corpus
from line_reader import LineReader, content, segments_of

from pkm_lightning.data import sharded
from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.shards import build as shard_build
from pkm_lightning.data.shards.build import build_shards
from pkm_lightning.data.shards.format import PARTS, ShardWriter
from pkm_lightning.data.shards.mapped import TokenShards, read_index
from pkm_lightning.data.shards.plan import Portion
from pkm_lightning.data.shards.record import BuildRecord
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer
from pkm_lightning.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file in range(4):
        lines = [f"document {file}.{i}" + " word" * (i % 7) + (" ~ and more" if i % 3 == 0 else "") for i in range(15)]
        lines += [f"what is {file}?| number {file}", " ", ""]
        (folder / f"{file}.lines").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard per 200 bytes of text."""
    monkeypatch.setattr(sharded, "build_shards", lambda *a, **k: build_shards(*a, **k, shard_bytes=200))


def documents(folder: Path, part: str) -> list[tuple[str, list[bool], list[int]]]:
    """Returns text, targets and place of each document of a part."""
    tokenizer, shards = Tokenizer.load(folder / "tokenizer.json"), TokenShards(folder, part)
    if not shards.shards:
        return []
    begins = np.concatenate([shards.begins(shard) for shard in range(len(shards.shards))])
    places = np.concatenate([shards.places(shard) for shard in range(len(shards.shards))])
    entries = []
    for begin, end, place in zip(begins, [*begins[1:], shards.n_tokens], places.tolist(), strict=True):
        span = np.asarray([begin]), np.asarray([end - begin])
        ids = shards.spans(*span)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]
        entries.append((tokenizer.decode(ids), shards.learned_spans(*span).tolist(), place))
    return entries


def expected(files: list[Path]) -> list[tuple[str, list[bool], list[int]]]:
    entries = []
    for file, path in enumerate(files):
        for record, line in enumerate(path.read_text().splitlines()):
            if line.strip():
                segments = segments_of(line.replace(" ~", ""))
                learned = [segment.learned for segment in segments for _ in segment.text] + [segments[-1].learned]
                entries.append(("".join(segment.text for segment in segments), learned, [file, record]))
    return entries


def test_every_document_lies_in_one_part(corpus: Path, tmp_path: Path, small_shards: None) -> None:
    data = line_corpus(corpus, tmp_path / "cache", test_fraction=0.1)
    folder = data.cache_folder()
    index = read_index(folder)
    parts = {part: documents(folder, part) for part in PARTS}
    files = sorted(corpus.iterdir())
    assert sorted((entry for entries in parts.values() for entry in entries), key=lambda e: e[2]) == expected(files)
    assert all(parts.values())
    assert len(index["parts"]["train"]) > 4
    assert any(shard["targets"] < shard["tokens"] for shard in index["parts"]["train"])
    size = sum(file.stat().st_size for file in files)
    assert index["read"] == {"files": 4, "documents": 64, "bytes": size}
    assert index["skipped"] == {"blank documents": 8, "files of other endings: .py": 2}
    assert index["text_bytes"] == {part: sum(len(text) for text, _, _ in parts[part]) for part in PARTS}
    held_out = [text for text, learned, _ in parts["validation"] if not learned[0]]
    assert json.loads((folder / "questions.json").read_text()) == [
        [question + "?", answer.strip()] for question, _, answer in (text.partition("?") for text in held_out)
    ]


def test_parts_have_files_of_their_own(
    corpus: Path, tmp_path: Path, small_shards: None, caplog: pytest.LogCaptureFixture
) -> None:
    files = [str(corpus / f"{i}.lines") for i in range(4)]
    data = line_corpus(files[:2], tmp_path / "cache", val_path=files[2], test_path=files[3])
    folder = data.cache_folder()
    assert "also in data.path" not in caplog.text
    line_corpus(files[:2], tmp_path / "cache", val_path=files[0], test_path=files).cache_folder()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        f"data.val_path={files[0]}: 1 file, {files[0]} among them, is also in data.path: the validation part holds "
        "documents that were trained on.",
        f"data.test_path={tuple(files)}: 2 files, {files[0]} among them, are also in data.path: the test part holds "
        "documents that were trained on.",
    ]
    for part, own in (("train", files[:2]), ("validation", files[2:3]), ("test", files[3:])):
        assert documents(folder, part) == expected([Path(file) for file in own]), part
    assert (
        data.cache_key()
        == line_corpus(files[:2], tmp_path, val_path=files[2], test_path=files[3], val_fraction=0.4).cache_key()
    )
    (corpus / "2.lines").write_text(" \n")
    with pytest.raises(DataError, match=r"the files of the validation part hold no text"):
        line_corpus(files[:2], tmp_path / "cache", val_path=files[2]).cache_folder()


@pytest.mark.parametrize("shard_bytes", [1, 300, 1_000_000])
def test_the_size_of_shards_changes_no_token(corpus: Path, tmp_path: Path, shard_bytes: int) -> None:
    data = line_corpus(corpus, tmp_path)
    folders = []
    for size in (shard_bytes, 777):
        folders.append(tmp_path / str(size))
        folders[-1].mkdir()
        readers = lambda: {"train": LineReader(sorted(corpus.iterdir()))}  # noqa: E731
        build_shards(
            folders[-1],
            readers=readers,
            fractions=data.fractions,
            choice=data.tokenizer_choice,
            name="x",
            shard_bytes=size,
        )
    for part in PARTS:
        assert documents(folders[0], part) == documents(folders[1], part)


def test_names_of_control_tokens_mean_them_in_rendered_segments_alone() -> None:
    tokenizer = bytes_tokenizer(["<|user|>"])
    segments = [Segment("a<|user|>"), Segment("<|user|>b", True, True), Segment(""), Segment("<eos>", False, True)] * 3
    name, (b,) = tokenizer.encode("<|user|>"), tokenizer.encode("b")
    expected = [[*tokenizer.encode("a"), *name], [258, b], [], [tokenizer.eos_id]] * 3
    portion = Portion("train", True, True, Piece(0, 0, ()), tuple(segments))
    assert [np.concatenate(ids).tolist() for ids in shard_build._encode(tokenizer, [portion])] == expected
    assert len(name) == 8


class Interruptions:
    """Raises `error` at the n-th of all calls that write something."""

    def __init__(self, patch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
        self.calls, self.at, self._error = 0, -1, error
        for owner, name in (
            (ShardWriter, "write"),
            (ShardWriter, "close"),
            (ShardWriter, "_write"),
            (BuildRecord, "save"),
            (os, "fsync"),
            (os, "replace"),
            (Path, "rename"),
        ):
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self._error()
            return function(*arguments, **keywords)

        return call


FULL = (
    r"data\.cache_dir=.* cannot be written \(No space left on device: .*\); free space there, or set data\.cache_dir.*"
    r"( What was prepared is kept, and the same command continues with it\.)?"
)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [KeyboardInterrupt, full_disk], ids=["interrupted", "full disk"])
def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(
    error: Callable[[], BaseException],
    corpus: Path,
    tmp_path: Path,
    small_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = content(line_corpus(corpus, tmp_path / "undisturbed").cache_folder())
    interruptions, full = Interruptions(monkeypatch, error), list[str]()
    line_corpus(corpus, tmp_path / "counted").cache_folder()
    assert interruptions.calls > 200
    for stride in (37, 61):
        cache = tmp_path / f"stride {stride}"
        data = line_corpus(corpus, cache)
        folder, attempts = None, 0
        while folder is None:
            attempts += 1
            interruptions.calls, interruptions.at = 0, attempts * stride % 151 + 1
            try:
                folder = data.cache_folder()
            except KeyboardInterrupt:
                pass
            except DataError as refusal:
                full.append(str(refusal))
            assert attempts < 150
        interruptions.at = -1
        assert attempts > 5
        assert content(folder) == undisturbed
        assert [path.name for path in cache.iterdir() if path.name.endswith(".part")] == []
    assert all(re.fullmatch(FULL, refusal) for refusal in full), full


def test_what_is_complete_is_not_tokenised_again(
    corpus: Path, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = line_corpus(corpus, tmp_path / "cache", tokenizer="bpe", vocab_size=270)
    interruptions = Interruptions(monkeypatch, KeyboardInterrupt)
    interruptions.at = 150
    with pytest.raises(KeyboardInterrupt):
        data.cache_folder()
    (part,) = (tmp_path / "cache").glob(".*.part")
    record = BuildRecord.load(part)
    assert record is not None
    complete = {name: (part / name).stat().st_mtime_ns for name in [*record.sha256, "tokenizer.json"]}
    assert len(complete) > 6
    interruptions.at = -1
    with caplog.at_level("INFO"):
        folder = data.cache_folder()
    assert (
        f"continues a preparation that was interrupted, after {sum(map(len, record.shards.values()))} shards"
        in caplog.text
    )
    assert {name: (folder / name).stat().st_mtime_ns for name in complete} == complete


def test_bad_input_leaves_nothing(corpus: Path, tmp_path: Path, small_shards: None) -> None:
    with (corpus / "3.lines").open("a") as file:
        file.write("BAD\n")
    with pytest.raises(DataError, match=r"3\.lines:19 is malformed"):
        line_corpus(corpus, tmp_path / "cache").cache_folder()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_changes_under_the_build_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(folder: Path, **keywords: Any) -> None:
        build_shards(folder, **keywords)
        os.utime(corpus / "1.lines", ns=(1, 1))

    monkeypatch.setattr(sharded, "build_shards", changing)
    with pytest.raises(DataError, match=r"1\.lines has changed while it was prepared"):
        line_corpus(corpus, tmp_path / "cache").cache_folder()


def test_a_thread_that_reads_ends_with_its_build(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_build._Build, "_write", fail)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        line_corpus(corpus, tmp_path / "cache").cache_folder()
    assert threading.active_count() == before


def test_what_was_found_is_logged_before_training(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = line_corpus(corpus, tmp_path / "cache")
    with caplog.at_level("INFO"):
        data.setup("fit")
    size = sum(file.stat().st_size for file in corpus.iterdir())
    train, validation = TokenShards(data.cache_folder(), "train"), TokenShards(data.cache_folder(), "validation")
    assert [record.message for record in caplog.records][-3:] == [
        f"read: 4 files, 64 documents, {size:,} bytes",
        f"{train.n_tokens:,} tokens in {train.n_documents} documents for training, {validation.n_tokens:,} tokens in "
        f"{validation.n_documents} documents for validation",
        "skipped: 8 blank documents, 2 files of other endings: .py",
    ]
