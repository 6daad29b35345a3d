"""Hugging Face folders without a tokenizer.json: transformers converts them, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import PAGES, sentencepiece_model

from pkm_lightning.data import tokenizer_files
from pkm_lightning.data.tokenizer import train_bpe
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
from pkm_lightning.errors import DataError


def folder(path: Path, files: dict[str, bytes], **config: Any) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def bpe_files() -> dict[str, bytes]:
    model = json.loads(train_bpe(PAGES[:1], 500).to_json())["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": f"#version: 0.2\n{merges}".encode()}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "T5Tokenizer"])
def test_ids_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    of_bytes = name in ("GPT2Tokenizer", "Qwen2Tokenizer")
    model = {"LlamaTokenizer": "tokenizer.model", "T5Tokenizer": "spiece.model"}
    files = bpe_files() if of_bytes else {model[name]: sentencepiece_model("bpe" if name[0] == "L" else "unigram")}
    end = "<eos>" if of_bytes else "</s>"
    path = folder(tmp_path / "mine", files, tokenizer_class=name, eos_token=end, chat_template="{{ messages }}")
    choice = TokenizerChoice(str(path), 0, tmp_path / "cache")
    tokenizer = choice.read()
    theirs = AutoTokenizer.from_pretrained(path)
    lines = [line for line in PAGES[1].splitlines() if "<" not in line and "\u2581" not in line]
    for text in [*lines, *PAGES[-2:]]:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.chat_template == "{{ messages }}"
    monkeypatch.setattr(tokenizer_files, "convert_tokenizer", None)
    assert choice.read().digest == tokenizer.digest


BROKEN: list[tuple[dict[str, bytes], dict[str, Any]]] = [
    ({"tokenizer.model": b"\x00\xff" * 100}, {"tokenizer_class": "LlamaTokenizer"}),
    ({"vocab.json": b"{", "merges.txt": b""}, {"tokenizer_class": "GPT2Tokenizer"}),
    ({"vocab.json": b"[1]", "merges.txt": b"\xff"}, {"tokenizer_class": "GPT2Tokenizer"}),
]


@pytest.mark.parametrize(("files", "config"), BROKEN)
def test_broken_folders_are_refused_in_a_sentence(
    files: dict[str, bytes], config: dict[str, Any], tmp_path: Path
) -> None:
    path = folder(tmp_path / "mine", files, **config)
    with pytest.raises(DataError, match=r"data\.tokenizer=.*mine") as refusal:
        TokenizerChoice(str(path), 0, tmp_path / "cache").read()
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "cache").glob("tokenizer-*")) == []
