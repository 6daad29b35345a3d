"""Byte-level tokenizers: lossless, deterministic; a prompt and its answer can be tokenised separately."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkm_lightning.data.tokenizer import Tokenizer, TokenizerChoice, bytes_tokenizer, train_bpe
from pkm_lightning.errors import ConfigError, DataError

CORPUS = ["Hank Aaron was born on February 5, 1934", "The capital of Chile is Santiago", "Sant Julià de Lòria"] * 3
TOKENIZERS = {"bpe": train_bpe(CORPUS, 400), "bytes": bytes_tokenizer()}
words = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).map(lambda s: "".join(s.split())).filter(bool)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(prompt=st.lists(words, min_size=1).map(" ".join), answer=st.lists(words, min_size=1).map(" ".join))
def test_prompt_and_answer_can_be_tokenised_separately(kind: str, prompt: str, answer: str) -> None:
    tokenizer = TOKENIZERS[kind]
    # U+0085 and the like are white space to the tokenizer but split no Python words.
    if prompt[-1].isspace() or answer[0].isspace():
        return
    assert tokenizer.encode(prompt) + tokenizer.encode(f" {answer}") == tokenizer.encode(f"{prompt} {answer}")


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.characters(blacklist_categories=["Cs"])))
def test_any_text_survives_and_holds_no_control_token(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("a<eos><pad>b")) == "a<eos><pad>b"
    assert tokenizer.decode([0, *tokenizer.encode("ab"), 1]) == "ab"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_saving_and_pickling_keep_everything(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode("born <eos> à") == tokenizer.encode("born <eos> à")
        assert (copy.pad_id, copy.eos_id, copy.vocab_size) == (0, 1, tokenizer.vocab_size)


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_bpe(CORPUS, 400).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_choices(tmp_path: Path) -> None:
    assert TokenizerChoice("bytes", 0).vocab_size() == bytes_tokenizer().vocab_size == 258
    assert TokenizerChoice("bpe", 300).vocab_size() == 300
    TOKENIZERS["bpe"].save(tmp_path / "tokenizer.json")
    choice = TokenizerChoice(str(tmp_path / "tokenizer.json"), 0)
    assert choice.vocab_size() == TOKENIZERS["bpe"].vocab_size
    assert choice.make(list).encode("born") == TOKENIZERS["bpe"].encode("born")


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size=257 is too small .* 258 or more"):
        TokenizerChoice("bpe", 257)
    with pytest.raises(ConfigError, match=r"data\.tokenizer='byte' is not known; .*Did you mean 'bytes'"):
        TokenizerChoice("byte", 300)
    with pytest.raises(DataError, match=r"missing\.json does not exist"):
        TokenizerChoice(str(tmp_path / "missing.json"), 0).vocab_size()
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json cannot be read"):
        TokenizerChoice(str(tmp_path / "bad.json"), 0).vocab_size()
    text = tmp_path / "noend.json"
    TOKENIZERS["bytes"].save(text)
    text.write_text(text.read_text().replace("<eos>", "<stop>"))
    with pytest.raises(DataError, match="has no end token; add one of: <eos>"):
        TokenizerChoice(str(text), 0).vocab_size()
