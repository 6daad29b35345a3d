"""Byte-level tokenizers: lossless, deterministic; a prompt and its answer can be tokenised separately."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, processors

from pkm_lightning.data import tokenizer as tokenizer_module
from pkm_lightning.data.bpe_process import EOS, PAD
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from pkm_lightning.data.tokenizer_choice import TokenizerChoice
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


def edited(edit: Callable[[Backend], object], path: Path) -> str:
    """Writes the BPE as another program might have saved it, and returns the path."""
    backend = Backend.from_str(TOKENIZERS["bpe"]._backend.to_str())
    edit(backend)
    backend.save(str(path))
    return str(path)


def _around_each_text(backend: Backend) -> None:
    special = [(PAD, 0), (EOS, 1)]
    backend.post_processor = processors.TemplateProcessing(single="<eos> $A <pad>", special_tokens=special)


#: Settings of a tokenizer.json that would cut, fill up or vary the data.
NEUTRALISED: dict[str, Callable[[Backend], object]] = {
    "truncation": lambda backend: backend.enable_truncation(4),
    "padding to a width": lambda backend: backend.enable_padding(length=64),
    "padding to the longest": lambda backend: backend.enable_padding(direction="left"),
    "both": lambda backend: [backend.enable_truncation(4, direction="left"), backend.enable_padding(length=8)],
    "special tokens around a text": _around_each_text,
    "dropout of merges": lambda backend: setattr(backend.model, "dropout", 0.9),
}


@pytest.mark.parametrize("name", NEUTRALISED)
def test_settings_that_would_change_the_data_are_off(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = edited(NEUTRALISED[name], tmp_path / "tokenizer.json")
    tokenizer = TokenizerChoice(path, 0).make(lambda: CORPUS)
    tokenizer.save(tmp_path / "saved.json")
    expected = [TOKENIZERS["bpe"].encode(text) for text in CORPUS]
    for copy in (tokenizer, Tokenizer.load(tmp_path / "saved.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert [copy.encode(text) for text in CORPUS] == copy.encode_batch(CORPUS) == expected
    if name != "special tokens around a text":  # which no encoding asks for
        assert tokenizer.digest == TOKENIZERS["bpe"].digest
    assert caplog.text == ""


def test_a_control_token_that_is_not_called_special_is_no_text(tmp_path: Path) -> None:
    content = json.loads(TOKENIZERS["bpe"]._backend.to_str())
    content["added_tokens"] = [{**token, "special": False} for token in content["added_tokens"]]
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    for name in ("<eos>", "a<eos>b", "a<pad>"):
        assert tokenizer.encode(name) == TOKENIZERS["bpe"].encode(name)
        assert tokenizer.decode(tokenizer.encode(name)) == name
    assert tokenizer.vocab_size == TOKENIZERS["bpe"].vocab_size


def _without_letters(backend: Backend) -> None:
    backend.model = models.BPE(vocab={PAD: 0, EOS: 1, "H": 2, "a": 3}, merges=[])


CHANGES: dict[str, tuple[Callable[[Backend], object], str]] = {
    "lower case": (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "'Hank Aaron' becomes 'hank aaron'"),
    "no accents": (
        lambda b: setattr(b, "normalizer", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "'Sant Julià de Lòria' becomes 'Sant Julia de Loria'",
    ),
    "unknown letters": (_without_letters, "'Hank Aaron' becomes 'Haa'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_vocabulary_that_changes_the_text_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit, change = CHANGES[name]
    TokenizerChoice(edited(edit, tmp_path / "t.json"), 0).make(lambda: ["Hank Aaron", "Sant Julià de Lòria"])
    assert f"t.json changes the text: {change}; training sees the text so changed" in caplog.text


def test_long_texts_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["bpe"]
    texts = ["born in Chile " * 30, "", "Santiago"]
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer_module, "MAX_CHUNK_CHARACTERS", 40)
    monkeypatch.setattr(tokenizer_module, "CALL_CHARACTERS", 50)
    assert tokenizer.encode_batch(texts) == expected


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


END = "<|im_end|>"


def with_two_ends(folder: Path, config: str) -> Path:
    """A tokenizer whose vocabulary has the tokens `<eos>` and `END`, in a folder as Hugging Face writes it."""
    backend = Backend.from_str(bytes_tokenizer().to_json())
    backend.add_special_tokens([END])
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(config)
    return folder


@pytest.mark.parametrize("config", [f'{{"eos_token": "{END}"}}', f'{{"eos_token": {{"content": "{END}"}}}}'])
def test_the_end_token_that_a_folder_names_is_kept_in_the_file_itself(config: str, tmp_path: Path) -> None:
    choice = TokenizerChoice(str(with_two_ends(tmp_path, config)), 0)
    tokenizer = choice.make(lambda: CORPUS)
    assert tokenizer.eos_id == 258
    assert tokenizer.encode(END) == list(range_of(bytes_tokenizer(), END))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "tokenizer.json").write_text(tokenizer.to_json())
    copy = Tokenizer.load(tmp_path / "copy" / "tokenizer.json")
    assert (copy.eos_id, copy.digest) == (258, tokenizer.digest)
    assert pickle.loads(pickle.dumps(copy)).eos_id == 258
    # Other readers of the file add nothing to a text.
    assert Backend.from_str(tokenizer.to_json()).encode("one").ids == bytes_tokenizer().encode("one")
    # The usual end token is another tokenizer, whose prepared data are others.
    usual = TokenizerChoice(str(tmp_path / "copy2.json"), 0)
    (tmp_path / "copy2.json").write_text((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    assert usual.make(lambda: CORPUS).digest != tokenizer.digest


@pytest.mark.parametrize("config", ["{}", '{"eos_token": "<eos>"}', '{"eos_token": null}', '{"eos_token": "absent"}'])
def test_the_usual_end_token_changes_nothing(config: str, tmp_path: Path) -> None:
    folder = with_two_ends(tmp_path, config)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    choice, plain = TokenizerChoice(str(folder), 0), TokenizerChoice(str(alone / "tokenizer.json"), 0)
    assert choice.identity() == plain.identity()
    assert choice.read().digest == plain.read().digest
    assert choice.read().eos_id == 1


def test_the_chat_template_goes_where_the_tokenizer_goes(tmp_path: Path) -> None:
    folder = with_two_ends(tmp_path, '{"chat_template": "{{ messages }}"}')
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "copy" / "tokenizer.json").chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("newer")
    assert Tokenizer.load(folder / "tokenizer.json").chat_template == "newer"


def range_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.encode(character)[0] for character in text]
