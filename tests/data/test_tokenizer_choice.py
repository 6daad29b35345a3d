"""The keys of data that decide a tokenizer: options of a trained vocabulary, refusals, and what caches are found by."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import PAGES

from pkm_lightning.data import bpe
from pkm_lightning.data.tokenizer import Tokenizer, train_bpe
from pkm_lightning.data.tokenizer_choice import SAMPLE_BYTES, TokenizerChoice
from pkm_lightning.errors import ConfigError, DataError

NAMES = ("<|user|>", "[INST]")


def choice(tokenizer: str = "bpe", **options: Any) -> TokenizerChoice:
    return TokenizerChoice.of({"tokenizer": tokenizer, "vocab_size": 400, **options}, Path("cache"))


def test_options_at_their_defaults_are_no_part_of_the_identity() -> None:
    plain: dict[str, Any] = {"special_tokens": [], "normalization": None, "tokenizer_pattern": None}
    for options in ({}, plain, {**plain, "tokenizer_bytes": SAMPLE_BYTES}):
        assert choice(**options).identity() == {"kind": "bpe", "size": 400}
        assert choice("bytes", **options).identity() == {"kind": "bytes", "size": 258}


@pytest.mark.parametrize(
    "option", [{"special_tokens": ["<|a|>"]}, {"normalization": "nfc"}, {"tokenizer_bytes": SAMPLE_BYTES + 1}]
)
def test_each_other_option_is_another_tokenizer(option: dict[str, Any]) -> None:
    assert choice(**option).identity() != choice().identity()
    # A sample is of no concern to bytes.
    assert (choice("bytes", **option).identity() == choice("bytes").identity()) == ("tokenizer_bytes" in option)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("in_process", [False, True])
def test_special_tokens_are_read_in_rendered_texts_only(
    kind: str, in_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_process:
        monkeypatch.setattr(bpe, "MOMENT_CHARACTERS", 100)
    made = choice(kind, special_tokens=list(NAMES)).make(lambda: [f"{NAMES[0]} a text {NAMES[1]}" * 20])
    assert made.vocab_size <= choice(kind, special_tokens=list(NAMES)).vocab_size()
    for tokenizer in (made, Tokenizer(made._backend.from_str(made.to_json()), "a copy")):
        ids = [tokenizer._backend.token_to_id(name) for name in NAMES]
        assert tokenizer.encode_rendered("".join(NAMES)) == ids
        assert tokenizer.encode_rendered(f"{NAMES[0]}hello{NAMES[1]}")[1:-1] == tokenizer.encode("hello")
        for name in NAMES:
            assert not set(tokenizer.encode(f"a{name} {name}")) & set(ids)
            assert tokenizer.decode(tokenizer.encode(name)) == name
        assert tokenizer.decode([*ids, *tokenizer.encode("one")]) == "one"


def test_special_tokens_take_no_ids_of_bytes() -> None:
    plain, more = choice("bytes").make(list), choice("bytes", special_tokens=list(NAMES)).make(list)
    assert more.encode("any text \u00e9") == plain.encode("any text \u00e9")
    assert more.vocab_size == plain.vocab_size + 2


NORMALISED = {
    "nfc": ("e\u0301", "\u00e9"),
    "nfkc": ("\ufb01", "fi"),
    "lowercase": ("E\u0301", "\u00e9"),
    "nfkc_lowercase": ("\uff21", "a"),
}


@pytest.mark.parametrize("normalization", NORMALISED)
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_normalisation_changes_texts_and_says_so(
    kind: str, normalization: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before, after = NORMALISED[normalization]
    tokenizer = choice(kind, normalization=normalization).make(lambda: [f"of {before} text"] * 3)
    assert tokenizer.decode(tokenizer.encode(before)) == after
    assert f"data.tokenizer={kind} with data.normalization={normalization} changes the text: " in caplog.text
    caplog.clear()
    choice(kind, normalization=normalization).make(lambda: ["plain text"] * 3)
    assert caplog.text == ""


def test_a_corpus_below_the_budget_is_read_whole() -> None:
    texts = ["some words of a text, number " + str(i) for i in range(5_000)]
    total = sum(map(len, texts))
    whole = train_bpe(texts, 400).to_json()
    assert choice().make(lambda: texts, bounded=True).to_json() == choice().make(lambda: texts).to_json() == whole
    smaller = choice(tokenizer_bytes=100_000)
    assert total > 100_000
    assert smaller.make(lambda: texts, bounded=True).to_json() != whole
    assert smaller.make(lambda: texts).to_json() == whole


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"special_tokens": ["<|a|>", "<|a|>"]}, r"special_tokens=\[<\|a\|>, <\|a\|>\]: '<\|a\|>' stands there twice"),
    ({"special_tokens": ["<eos>"]}, "'<eos>' is a control token already"),
    ({"special_tokens": [" "]}, "' ' is blank"),
    ({"special_tokens": [3]}, "3 is not text"),
    ({"special_tokens": ["user"]}, "'user' is a word, which text may spell; .* such as <|user|>"),
    ({"special_tokens": ["###"]}, "'###' is a word"),
    ({"special_tokens": "<|a|>"}, "is not a list"),
    ({"special_tokens": ["<|a|>", "<|b|>"], "vocab_size": 259}, "256 bytes and 4 control tokens need 260 or more"),
    ({"normalization": "nfx"}, "data.normalization='nfx' is not known; allowed: null, nfc"),
    ({"tokenizer_bytes": 10}, "data.tokenizer_bytes=10 is out of range; allowed: 100000 or more"),
    ({"tokenizer_bytes": 1e9}, "is not a whole number"),
    ({"tokenizer_pattern": "gpt2"}, "data.tokenizer_pattern='gpt2' is for .tiktoken files, and data.tokenizer=bpe"),
    ({"tokenizer": "ranks.tiktokn"}, "is not known; allowed: bpe, bytes, or the path"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerChoice.of({"tokenizer": "bpe", "vocab_size": 400, **options}, Path("cache"))


def test_a_file_must_have_what_the_options_ask_for(tmp_path: Path) -> None:
    options = {"special_tokens": list(NAMES), "normalization": "nfc"}
    file = tmp_path / "tokenizer.json"
    choice(**options).make(lambda: PAGES[:1]).save(file)
    # The tokenizer of a run replaces the kind of a saved configuration, and nothing else of it.
    assert choice(str(file), **options).read().encode("a") == choice(str(file)).read().encode("a")
    for wrong, message in (
        ({"special_tokens": ["<|b|>"]}, r"<\|b\|> is no control token of data.tokenizer=.*tokenizer.json"),
        ({"normalization": "nfkc"}, "data.normalization=nfkc is for data.tokenizer=bpe and bytes"),
        ({"tokenizer_pattern": "gpt2"}, "data.tokenizer_pattern='gpt2' is for .tiktoken files; .* has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            choice(str(file), **wrong).read()


def test_a_missing_file_is_named_before_it_is_hashed() -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer=none\.json does not exist; set bpe, bytes or the path"):
        choice("none.json").identity()
