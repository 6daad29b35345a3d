"""Pieces of a text have the ids of the whole, for tokenizers of every make; where that is not known, nothing is cut."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
from tokenizer_makers import ODD, PAGES, ranks, sentencepiece_model
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pkm_lightning.data import tokenizer as tokenizer_module
from pkm_lightning.data.sentencepiece_file import read_model
from pkm_lightning.data.tiktoken_file import chosen_encoding, rank_backend
from pkm_lightning.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe

LLAMA2 = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
Edit = Callable[[Backend], object]


def _with(backend: Backend, *edits: Edit) -> Backend:
    for edit in edits:
        edit(backend)
    return backend


def _set(**parts: object) -> Edit:
    return lambda backend: [setattr(backend, name, part) for name, part in parts.items()]


def _own() -> Backend:
    return Backend.from_str(train_bpe(PAGES[:2], 400).to_json())


def _without_pre_tokenizer(**options: object) -> Backend:
    """A BPE as files of Llama 2 hold it: merges run over the whole text."""
    return _with(read_model(sentencepiece_model("bpe", **LLAMA2), "mine"), lambda b: setattr(b, "pre_tokenizer", None))


def _rank_backend(pattern: str) -> Backend:
    return rank_backend(ranks(), chosen_encoding("x.tiktoken", pattern, [], len(ranks())), "x")


#: Tokenizers that may be cut.
EXACT: dict[str, Callable[[], Backend]] = {
    "own": _own,
    "own, normalised": lambda: _with(_own(), _set(normalizer=normalizers.Sequence([normalizers.NFKC()]))),
    "space added before a text": lambda: _with(_own(), _set(pre_tokenizer=pre_tokenizers.ByteLevel(True))),
    "gpt2": lambda: _rank_backend("gpt2"),
    "cl100k_base": lambda: _rank_backend("cl100k_base"),
    "o200k_base": lambda: _rank_backend("o200k_base"),
    "llama3": lambda: _rank_backend("llama3"),
    "digits apart": lambda: _with(
        _own(),
        _set(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
    ),
    "unigram": lambda: read_model(sentencepiece_model("unigram"), "mine"),
    "unigram with bytes": lambda: read_model(sentencepiece_model("unigram", **LLAMA2), "mine"),
    "bpe": lambda: read_model(sentencepiece_model("bpe"), "mine"),
    "bpe of Llama 2": lambda: read_model(sentencepiece_model("bpe", **LLAMA2), "mine"),
    "bpe without a pre-tokenizer": _without_pre_tokenizer,
    "bpe with symbols": lambda: read_model(sentencepiece_model("bpe", user_defined_symbols="@@,<|user|>"), "mine"),
    "metaspace": lambda: _with(
        _without_pre_tokenizer(),
        _set(normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)),
    ),
}  # fmt: skip


def texts() -> list[str]:
    draw = random.Random(1)
    fragments = [
        "the",
        "a1",
        "Größe",
        "漢字",
        "...",
        "12345",
        "don't",
        "e\u0301",
        "\U0001f600",
        "\u200bx",
        "(b)",
        "@@",
        "one@@",
    ]
    spaces = [" ", " ", " ", "  ", "\n", " \n", "\t", "\u3000", "\u00a0"]
    drawn = ["".join(draw.choice(fragments) + draw.choice(spaces) for _ in range(60)) for _ in range(60)]
    return [*drawn, *PAGES[:2], PAGES[-1], *ODD]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("error")
def test_pieces_have_the_ids_of_the_whole(name: str) -> None:
    tokenizer = Tokenizer(EXACT[name](), "mine")
    cut = 0
    for text in texts():
        pieces = tokenizer.pieces(text, 20)
        cut += len(pieces) - 1
        assert [i for ids in tokenizer.encode_pieces(pieces) for i in ids] == tokenizer.encode(text)
    assert cut > 100


@pytest.mark.parametrize("name", EXACT)
def test_a_text_that_follows_another_has_the_ids_that_it_has_there(name: str) -> None:
    tokenizer = Tokenizer(EXACT[name](), "mine")
    for before, after in (("the capital of Chile", " is Santiago de Chile"), ("number 12", " 34 is a number of it")):
        pieces = [*tokenizer.pieces(before, 5), *tokenizer.pieces(after, 5, follows=True)]
        assert [i for ids in tokenizer.encode_pieces(pieces) for i in ids] == tokenizer.encode(before + after)


def test_our_own_vocabularies_are_cut_as_before() -> None:
    text = "a (b) ... \u00e9 -- " * 100
    for tokenizer in (train_bpe(PAGES[:1], 300), bytes_tokenizer()):
        assert len(tokenizer.pieces(text, 10)) > 100


#: Tokenizers that look further than a word.
WHOLE: dict[str, Callable[[], Backend]] = {
    "unigram without a pre-tokenizer": lambda: _with(
        read_model(sentencepiece_model("unigram"), "mine"), lambda b: setattr(b, "pre_tokenizer", None)
    ),
    "stripped": lambda: _with(_own(), _set(normalizer=normalizers.Strip())),
    "a pattern that looks back": lambda: _with(
        _own(),
        _set(
            pre_tokenizer=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"(?<=the )\w+|\s+|\S+"), "isolated"),
                    pre_tokenizers.ByteLevel(False, use_regex=False),
                ]
            )
        ),
    ),
    "a replacement": lambda: _with(_own(), _set(normalizer=normalizers.Replace(Regex(" the"), "the"))),
    "an added token over a space": lambda: _with(_own(), lambda b: b.add_tokens([AddedToken("New York")])),
    "an added token that takes spaces": lambda: _with(_own(), lambda b: b.add_tokens([AddedToken("@@", rstrip=True)])),
    "merges over spaces": lambda: Backend(
        models.BPE({"a": 0, " ": 1, "a ": 2, "<eos>": 3}, [("a", " ")], unk_token="<eos>")
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_may_look_further_is_encoded_whole(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = Tokenizer(WHOLE[name](), "mine")
    caplog.clear()  # of what the conversion of the file remarks
    text = "the cat New York the@@ a a " * 10
    assert tokenizer.pieces(text, 20) == [text]
    assert caplog.text == ""
    monkeypatch.setattr(tokenizer_module, "MAX_WHOLE_CHARACTERS", 100)
    assert len(tokenizer.pieces(text, 20)) > 1
    assert len(tokenizer.pieces(text, 20)) > 1
    assert caplog.text.count("those of more than 100 characters are cut, where ids may differ") == 1


def test_encoding_without_offsets_gives_the_same_ids() -> None:
    for name in ("own", "cl100k_base", "unigram with bytes", "bpe of Llama 2"):
        tokenizer = Tokenizer(EXACT[name](), "mine")
        for ids, text in zip(tokenizer.encode_pieces(texts()), texts(), strict=True):
            assert ids == tokenizer._backend.encode(text, add_special_tokens=False).ids
