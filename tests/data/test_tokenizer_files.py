"""Files and folders that hold a tokenizer: converted once, kept, and refused in a sentence where they are damaged."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import PAGES, rank_file, ranks, sentencepiece_model

from pkm_lightning.data import tokenizer_files
from pkm_lightning.data.bpe_process import byte_letters
from pkm_lightning.data.sentencepiece_file import read_model
from pkm_lightning.data.tiktoken_file import ENCODINGS, Encoding
from pkm_lightning.data.tokenizer import train_bpe
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import ConfigError, DataError, PkmError


def choice(path: Path, **options: Any) -> TokenizerChoice:
    return TokenizerChoice.of({"tokenizer": str(path), "vocab_size": 0, **options}, path.parent / "cache")


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "mine.tiktoken", rank_file(ranks()))
    first = choice(file, tokenizer_pattern="gpt2")
    digest, identity = first.read().digest, first.identity()
    monkeypatch.setattr(tokenizer_files, "rank_backend", None)
    assert choice(file, tokenizer_pattern="gpt2").read().digest == digest
    # Its content is what counts, not when it was written.
    file.write_bytes(file.read_bytes())
    assert choice(file, tokenizer_pattern="gpt2").identity() == identity
    monkeypatch.undo()
    assert choice(file, tokenizer_pattern="cl100k_base").identity() != identity
    file.write_bytes(rank_file(dict(list(ranks().items())[:-1])))
    assert choice(file, tokenizer_pattern="gpt2").identity() != identity


def test_control_tokens_of_a_rank_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(ranks())
    # As the file of Llama 3 is called.
    file = written(tmp_path / "tokenizer.model", rank_file(ranks()))
    names = ["<|im_start|>", "<|im_end|>"]
    tokenizer = choice(file, tokenizer_pattern="llama3", special_tokens=names).read()
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (n + 1, n + 2)
    assert tokenizer.encode_rendered("".join(names)) == [n, n + 1]
    assert n not in tokenizer.encode(names[0])
    # A text must end, so an end token follows where none is named.
    other = choice(file, tokenizer_pattern="llama3", special_tokens=["<|user|>"]).read()
    assert (other.eos_id, other.token(other.eos_id)) == (n + 1, "<|endoftext|>")
    encoding = Encoding(ENCODINGS["gpt2"].pattern, {"<|endoftext|>": n + 5}, n)
    monkeypatch.setitem(ENCODINGS, "gpt2", encoding)
    named = choice(written(tmp_path / "gpt2.tiktoken", rank_file(ranks()))).read()
    assert (named.eos_id, named.vocab_size) == (n + 5, n + 6)
    with pytest.raises(DataError, match=rf"has {n - 1} tokens, and the published encoding of this name {n}"):
        choice(written(tmp_path / "gpt2.tiktoken", rank_file(dict(list(ranks().items())[:-1])))).read()


def test_a_folder_of_vocab_and_merges_is_a_bpe_of_bytes(tmp_path: Path) -> None:
    model = json.loads(train_bpe(PAGES[:1], 500).to_json())["model"]
    folder = tmp_path / "folder"
    written(folder / "vocab.json", json.dumps(model["vocab"]).encode())
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    written(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
    tokenizer = choice(folder).read()
    assert tokenizer.encode(PAGES[1]) == train_bpe(PAGES[:1], 500).encode(PAGES[1])
    assert tokenizer.eos_id == 1
    (folder / "merges.txt").write_text("#version: 0.2\nnone here\n")
    with pytest.raises(DataError, match=r"vocab.json or merges.txt is damaged"):
        choice(folder).read()
    (folder / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"merges.txt does not exist; give a folder with tokenizer.json"):
        choice(folder).read()


def test_a_sentencepiece_model_alone_or_in_a_folder(tmp_path: Path) -> None:
    model = sentencepiece_model("bpe", byte_fallback=True)
    alone = choice(written(tmp_path / "mine.model", model)).read()
    folder = choice(written(tmp_path / "folder" / "tokenizer.model", model).parent).read()
    assert alone.encode(PAGES[0]) == folder.encode(PAGES[0])
    assert (alone.eos_id, alone.token(alone.eos_id)) == (2, "</s>")
    # What lies beside it is obeyed: here the end token.
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>", "chat_template": "{{ messages }}"}')
    beside = choice(tmp_path / "mine.model").read()
    assert (beside.eos_id, beside.chat_template) == (1, "{{ messages }}")


def _letter(byte: int) -> bytes:
    return base64.b64encode(bytes([byte]))


LINES = rank_file(ranks()).splitlines(keepends=True)
BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.tiktoken", b"", "has no token for 256 of the 256 bytes"),
    "not base64": ("a.tiktoken", b"".join([*LINES, b"a*b= 900\n"]), f"line {len(LINES) + 1} holds 'a\\*b= 900'"),
    "no rank": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8=\n"]), "a line of a rank file has a token in base64"),
    "a rank that is no number": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8= -1\n"]), "holds 'aGVsbG8= -1'"),
    "a huge rank": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8= 99999999999\n"]), "holds 'aGVsbG8= 99999999999'"),
    "three fields": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8= 900 1\n"]), "holds 'aGVsbG8= 900 1'"),
    "a rank twice": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8= 5\n"]), "has the rank 5 of line 6 again"),
    "a token twice": (
        "a.tiktoken",
        b"".join([*LINES, LINES[7].split()[0], b" 9000\n"]),
        "has the token of line 8 again",
    ),
    "a byte is missing": ("a.tiktoken", b"".join(line for line in LINES if line.split()[0] != _letter(65)), "0x41"),
    "ranks are missing": ("a.tiktoken", b"".join([*LINES, b"aGVsbG8= 5000\n"]), "ranks up to 5000 for .* are missing"),
    "binary ranks": ("a.tiktoken", bytes(range(256)) * 9, "line 1 holds"),
    "no model": ("a.model", b"\x00\xff\x01" * 99, "is no SentencePiece model, or a damaged one"),
    "an empty model": ("a.model", b"", "it holds no vocabulary with one unknown token"),
    "half a model": ("a.model", sentencepiece_model("bpe")[:-70_001], "is no SentencePiece model"),
    "no json": ("a.json", b"\x00\xff", "cannot be read"),
    "half a json": ("a.json", train_bpe(PAGES[:1], 300).to_json().encode()[:-50], "cannot be read"),
    "other json": ("a.json", b'{"a": 1}', "it must be a tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    with pytest.raises(DataError, match=message) as refusal:
        choice(written(tmp_path / file, content), tokenizer_pattern=None if file[-5:] == ".json" else "gpt2").read()
    assert f"data.tokenizer={tmp_path / file}" in str(refusal.value)
    assert list((tmp_path / "cache").glob("tokenizer-*")) == []


@pytest.mark.parametrize("kind", ["a.tiktoken", "a.model"])
def test_no_truncation_or_flipped_byte_ends_in_a_traceback(kind: str, tmp_path: Path) -> None:
    whole = (
        rank_file(ranks()) if kind == "a.tiktoken" else sentencepiece_model("bpe", normalization_rule_name="identity")
    )
    for i in range(12):
        place = len(whole) * i // 12
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            with contextlib.suppress(PkmError):
                choice(written(tmp_path / kind, content), tokenizer_pattern="gpt2").read()


PATTERNS = {
    "(": "is no regular expression",
    r"\p{N}{1,3}+|\s+|\S+": r"write \(\?>X\{m,n\}\) or \\z",
    r"\s+|\S+": "text could spell the control token",
    r"\s+$|\s+|\S+": r"write \(\?>X",
    r"^[a-z ]+|\s+|\w+|[^\s\w]+": "would get other ids than by tiktoken",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_are_read_in_other_ways_are_refused(pattern: str, tmp_path: Path) -> None:
    file = written(tmp_path / "mine.tiktoken", rank_file(ranks()))
    with pytest.raises(PkmError, match=PATTERNS[pattern]):
        choice(file, tokenizer_pattern=pattern).read()
    allowed = choice(file, tokenizer_pattern=r"[$]|\p{L}+|(?>\p{N}{1,3})|\s+|[^\s\p{L}\p{N}]+").read()
    assert allowed.decode(allowed.encode("a$ 12345")) == "a$ 12345"


def test_what_a_rank_file_needs(tmp_path: Path) -> None:
    file = written(tmp_path / "cl100kbase.tiktoken", rank_file(ranks()))
    with pytest.raises(ConfigError, match=r"needs data.tokenizer_pattern.* Did you mean 'cl100k_base'"):
        choice(file).read()
    with pytest.raises(ConfigError, match="'user' is a word"):
        choice(file, tokenizer_pattern="gpt2", special_tokens=["user"]).read()
    with pytest.raises(DataError, match=r"a\.tiktoken does not exist"):
        choice(tmp_path / "a.tiktoken").read()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, r"holds no tokenizer; give a folder with tokenizer.json"),
    "of something else": (lambda folder: (folder / "notes.txt").write_text("x"), "holds no tokenizer"),
    "a damaged configuration": (
        lambda folder: [
            written(folder / "tokenizer.model", sentencepiece_model("bpe")),
            (folder / "tokenizer_config.json").write_text("{"),
        ],
        r"tokenizer_config.json cannot be read",
    ),
    "letters": (
        lambda folder: [(folder / "vocab.json").write_text('{"a": 0}'), (folder / "merges.txt").write_text("")],
        "not one of bytes",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_without_a_tokenizer_are_refused(name: str, tmp_path: Path) -> None:
    make, message = FOLDERS[name]
    (tmp_path / "folder").mkdir()
    make(tmp_path / "folder")
    with pytest.raises(DataError, match=message):
        choice(tmp_path / "folder").read()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = ("sentencepiece", "transformers", "tiktoken")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))
    model = written(tmp_path / "mine.model", sentencepiece_model("bpe"))
    with pytest.raises(ConfigError, match=r"mine.model needs sentencepiece, .* pip install 'pkm_lightning\[data\]'"):
        choice(model).read()
    folder = written(tmp_path / "folder" / "tokenizer.model", model.read_bytes()).parent
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"needs transformers, .* pip install 'pkm_lightning\[hf\]'"):
        choice(folder).read()
    # Rank files need neither.
    ranks_only = choice(written(tmp_path / "x.tiktoken", rank_file(ranks())), tokenizer_pattern="gpt2").read()
    assert ranks_only.decode(ranks_only.encode("a b")) == "a b"


def test_letters_of_bytes_are_those_of_the_library() -> None:
    text = bytes(range(256)).decode("latin-1")
    for byte, letter in enumerate(byte_letters()):
        assert len(letter) == 1
        assert letter != chr(byte) or text[byte].isprintable()
    assert len(set(byte_letters())) == 256


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_warning_names_what_is_not_exact(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    read_model(sentencepiece_model(kind, user_defined_symbols="<|user|>,@@"), "mine")
    (warning,) = (r.getMessage() for r in caplog.records if "unusual texts get other ids than by" in r.getMessage())
    assert "sentencepiece ('<|user|>', '@@'" in warning
