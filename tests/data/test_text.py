"""Text: windows that tile the documents, splits that share nothing, and errors that name the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data import NO_TARGET, TextDataModule
from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.shards.mapped import TokenShards
from pkm_lightning.data.shards.plan import Divider, Plan
from pkm_lightning.data.split import Fractions
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError, DataError

STORY = "".join(f"Sentence number {i} of the story has its own number. " for i in range(200))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for i in range(20):
        (tmp_path / "deep" / f"{i:02}.txt").write_text(f"document {i} " * 30, encoding="utf-8")
    (tmp_path / "note.md").write_text("a note " * 20)
    (tmp_path / "ignored.py").write_text("x = 1")
    return tmp_path


def windows(datamodule: TextDataModule) -> list[dict[str, torch.Tensor]]:
    source = datamodule.splits.train
    return [source.__getitems__([i]) for i in range(datamodule.splits.order.size(0))]


def test_windows_tile_the_documents(text: Callable[..., TextDataModule], corpus: Path) -> None:
    datamodule = text(str(corpus), tokenizer="bytes")
    datamodule.prepare_data()
    eos = datamodule.tokenizer.eos_id
    batches = windows(datamodule)
    stream = torch.cat([batch["input_ids"][0] for batch in batches])
    for batch, after in pairwise(batches):
        ids, labels, docs = batch["input_ids"][0], batch["labels"][0], batch["doc_ids"][0]
        following = torch.cat([ids[1:], after["input_ids"][0, :1]])
        assert torch.equal(labels, torch.where(ids == eos, NO_TARGET, following))
        assert torch.equal(docs[1:] - docs[:-1], (ids[:-1] == eos).long())
        assert batch["valid"].all()
    documents = datamodule.tokenizer.decode(stream.tolist())
    assert documents.count("document") > 500


def test_what_was_read_and_left_out_is_said(
    text: Callable[..., TextDataModule], corpus: Path, tmp_path_factory: pytest.TempPathFactory, caplog: Any
) -> None:
    caplog.set_level("INFO")
    (corpus / "deep" / "more.gz").write_text("x")
    # A cache of its own, because only a build logs what it reads.
    datamodule = text(str(corpus), tokenizer="bytes", cache_dir=str(tmp_path_factory.mktemp("own")))
    datamodule.setup("fit")
    n_bytes = sum(file.stat().st_size for file in corpus.rglob("*") if file.suffix in (".txt", ".md"))
    train, validation = (TokenShards(datamodule.cache_folder(), part) for part in ("train", "validation"))
    assert [
        record.message
        for record in caplog.records
        if record.message.startswith(("read", "skip", f"{train.n_tokens:,}"))
    ] == [
        f"read: 21 files, 21 documents, {n_bytes:,} bytes",
        f"{train.n_tokens:,} tokens in {train.n_documents} documents for training, {validation.n_tokens:,} tokens in "
        f"{validation.n_documents} documents for validation",
        "skipped: 1 file of other endings: .gz, 1 file of other endings: .py",
    ]
    assert train.n_tokens + validation.n_tokens == n_bytes + 21
    n_lines = len(caplog.records)
    datamodule.setup("test")
    assert len(caplog.records) == n_lines


def test_validation_holds_whole_documents(text: Callable[..., TextDataModule], corpus: Path) -> None:
    datamodule = text(str(corpus / "deep"), val_fraction=0.1)
    datamodule.prepare_data()
    numbers = {}
    for name, source, n in (
        ("train", datamodule.splits.train, datamodule.splits.order.size(0)),
        ("validation", datamodule.splits.validation, len(datamodule.splits.validation_keys)),
    ):
        decoded = datamodule.tokenizer.decode(source.__getitems__(list(range(n)))["input_ids"].flatten().tolist())
        numbers[name] = set(decoded.replace("document", " ").split())
    assert not {f"{i}" for i in range(20)} & numbers["train"] & numbers["validation"]


def test_one_document_is_split_at_its_end(text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    datamodule = text(str(tmp_path / "story.txt"), val_fraction=0.2)
    datamodule.prepare_data()
    first = datamodule.splits.validation.__getitems__([0])["input_ids"][0].tolist()
    assert any(f"number {i}" in datamodule.tokenizer.decode(first) for i in (159, 160, 161))


def test_separator_lists_and_globs(text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"para {i} " * 10 for i in range(30)))
    for path in (str(tmp_path / "*.txt"), [str(tmp_path / "a.txt"), str(tmp_path)]):
        datamodule = text(path, document_separator=1)
        datamodule.prepare_data()
        ids = torch.cat([batch["input_ids"][0] for batch in windows(datamodule)])
        assert (ids == datamodule.tokenizer.eos_id).sum() >= 25


def test_parts_come_from_files_of_their_own_and_compressed_ones_count(
    text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.txt.gz").write_bytes(gzip.compress(f"{part} text ".encode() * 30))
    paths = {f"{part}_path": str(tmp_path / part) for part in ("val", "test")}
    datamodule = text(str(tmp_path / "train"), tokenizer="bytes", packing="none", seq_len=512, **paths)
    datamodule.prepare_data()
    loaders = (datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader())
    for part, loader in zip(("train", "val", "test"), loaders, strict=True):
        ids = next(iter(loader))["input_ids"][0].tolist()
        assert datamodule.tokenizer.decode(ids) == f"{part} text " * 30
    (tmp_path / "val" / "a.txt.gz").write_bytes(gzip.compress(b"ab\xff"))
    with pytest.raises(DataError, match=r"val/a\.txt\.gz is not UTF-8 at byte 2 of its text"):
        text(str(tmp_path / "train"), tokenizer="bytes", **paths).prepare_data()
    with pytest.raises(DataError, match=r"data\.test_path=nowhere does not exist"):
        text(str(tmp_path / "train"), test_path="nowhere").prepare_data()


def test_an_edited_file_is_read_again(text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    before = text(str(file)).fingerprint
    assert text(str(file)).fingerprint == before
    file.write_text(STORY + "More of it.")
    assert text(str(file)).fingerprint != before


def test_a_flipped_bit_in_any_prepared_file_is_mended_and_the_file_is_named(
    text: Callable[..., TextDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    first = text(str(tmp_path / "a.txt"))
    folder, fingerprint = first.cache_folder(), first.fingerprint
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        caplog.clear()
        datamodule = text(str(tmp_path / "a.txt"))
        datamodule.prepare_data()
        assert f"is damaged ({file.name} has changed since it was written) and is built again" in caplog.text
        assert file.read_bytes() == content
        assert datamodule.fingerprint == fingerprint


def test_a_tokenizer_that_truncates_makes_the_files_of_one_that_does_not(
    text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    made: list[dict[str, bytes]] = []
    for name, setting in (("plain", None), ("cut", {"direction": "Right", "max_length": 16, "stride": 0})):
        content = json.loads(bytes_tokenizer()._backend.to_str())
        content["truncation"] = setting and {**setting, "strategy": "LongestFirst"}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        folder = text(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / f"{name}.json")).cache_folder()
        names = ("train-00000.tokens", "validation-00000.tokens", "tokenizer.json")
        made.append({name: (folder / name).read_bytes() for name in names})
    assert made[0] == made[1]
    assert sum(len(content) for name, content in made[0].items() if "-" in name) == 2 * (len(STORY) + 2)


@given(documents=st.lists(st.text(st.sampled_from("abc "), min_size=1), min_size=1), share=st.floats(0, 1))
def test_a_cut_shares_nothing_and_loses_no_letter(documents: list[str], share: float) -> None:
    cut = round(sum(map(len, documents)) * share)
    divider = Divider(Plan("train", Fractions(0.1, 0, 0), cuts=(("validation", cut),)))
    pieces = (Piece(0, number, (Segment(text),)) for number, text in enumerate(documents))
    portions = [portion for piece in pieces for portion in divider.divide(piece)]
    both = "".join(portion.segments[0].text for portion in portions)
    assert both.replace(" ", "") == "".join(documents).replace(" ", "")
    parts = [portion.part for portion in portions]
    assert parts == sorted(parts, key=["train", "validation"].index)


def test_a_user_without_a_home_is_asked_for_a_cache_when_it_is_needed(
    text: Callable[..., TextDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(STORY)
    # As for a user id that the system does not know.
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    datamodule = text(str(tmp_path / "a.txt"), cache_dir="~/.cache/pkm_lightning")
    assert datamodule.vocab_size == 300, "what needs no cache goes on without"
    with pytest.raises(ConfigError, match=r"data\.cache_dir=~/\.cache/pkm_lightning: this user has no home directory"):
        datamodule.prepare_data()


def test_a_document_without_white_space_is_cut_within_its_only_word(
    text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\u6f22\u5b57" * 10_000, encoding="utf-8")
    datamodule = text(str(tmp_path / "a.txt"), tokenizer="bytes")
    datamodule.prepare_data()
    decoded = [
        datamodule.tokenizer.decode(np.fromfile(datamodule.cache_folder() / f"{part}-00000.tokens", np.uint16).tolist())
        for part in ("train", "validation")
    ]
    assert list(map(len, decoded)) == [18_000, 2_000]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({}, r"missing does not exist; give a file, a directory with \*\.txt, \*\.md, or a glob"),
        ({"missing/x.py": b"1"}, r"missing matches no file; directories are searched for \*\.txt"),
        ({"missing/x.txt": b" \n"}, r"no text in 1 file; give files that are not empty"),
        ({"missing/x.txt": b"ab\xff"}, r"x\.txt is not UTF-8 at byte 2"),
        ({"missing/x.txt": b"a b"}, r"the training part has \d+ tokens, a sequence of data\.seq_len=16 needs 17"),
        ({"missing/x.txt": b"many words " * 5}, r"the validation part has \d+ tokens.* raise data\.val_fraction"),
    ],
)
def test_bad_text_is_refused(
    text: Callable[..., TextDataModule], tmp_path: Path, make: dict[str, bytes], message: str
) -> None:
    for name, content in make.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text(str(tmp_path / "missing"), tokenizer="bytes").prepare_data()


def test_bad_keys_are_refused(text: Callable[..., TextDataModule]) -> None:
    with pytest.raises(ConfigError, match=r"data\.path= names no files"):
        text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir= names no directory"):
        text("x", cache_dir="")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=null names no directory"):
        text("x", cache_dir=None)
    with pytest.raises(ConfigError, match=r"data\.seq_len=10000000000 is out of range; allowed: 2 to 16777216"):
        text("x", seq_len=10**10)
    with pytest.raises(ConfigError, match=r"data\.prompts holds null"):
        text("x", prompts=["a", None])
    with pytest.raises(DataError, match=r"no/\*\.txt matches no file"):
        text("no/*.txt").prepare_data()
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.9 is out of range; allowed: 0\.001 to 0\.5"):
        text("x", val_fraction=0.9)
    with pytest.raises(ConfigError, match=r"data\.document_separator=0 is out of range"):
        text("x", document_separator=0)
    for endings, reason in (
        ([], "is not a list of endings"),
        ("txt", r"is not a list of endings; write data\.endings=\[\.txt,\.md\]"),
        (".py", r"is not a list of endings; write data\.endings=\[\.py\]"),
        (["txt"], "is not a list of endings"),
        ([".txt", ".gz"], r"\.gz is found behind every ending by itself"),
    ):
        with pytest.raises(ConfigError, match=rf"data\.endings=.*{reason}"):
            text("x", endings=endings)
    with pytest.raises(ConfigError, match=r"data\.seq_len=1 is out of range"):
        text("x", seq_len=1)
    with pytest.raises(ConfigError, match="missing or unknown keys: wrong"):
        text("x", wrong=1)
    with pytest.raises(ConfigError, match="not prepared; call prepare_data"):
        _ = text("x").tokenizer


def test_a_vocabulary_is_learned_from_all_of_a_compressed_corpus(
    text: Callable[..., TextDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for i, word in enumerate(["alpha", "beta", "gamma", "delta"]):
        # On disk a thousandth of its size, which says nothing about how much text there is.
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(f"{word} ".encode() * 40_000))
    datamodule = text(str(tmp_path), tokenizer_bytes=100_000, document_separator=1)
    datamodule.prepare_data()
    assert "learns from 0.1 MB of 0.8 MB of text" in caplog.text
    for word in ("alpha", "beta", "gamma", "delta"):
        assert len(datamodule.tokenizer.encode(f" {word}")) == 1
