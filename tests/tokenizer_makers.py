"""Small tokenizers of other libraries, trained on text that holds what real text holds."""

from __future__ import annotations

import base64
import functools
import io
import json
from typing import Any

from tree import ROOT

from pkm_lightning.data.bpe_process import byte_letters
from pkm_lightning.data.conversion_check import ORDINARY
from pkm_lightning.data.tokenizer import train_bpe

#: Prose, code, many scripts, emoji, digits, runs of spaces and lines.
FILES = [*sorted((ROOT / "docs").glob("*.md"))[:8], *sorted((ROOT / "tests" / "data").glob("*.py"))[:4]]
PAGES = [*(file.read_text(encoding="utf-8") for file in FILES), *ORDINARY * 3]
#: Lines that hold nothing ordinary.
ODD = [
    "", " ", "\n", "  a", "a  ", "\t\tx\n", "a\n\n b \r\nc", "1234567 8", "don't DON'T we'LL I'm", "a" * 50, "ab" * 40 + "a",
    "\U0001f600\u200d\u2764\ufe0f", "e\u0301\u0302", "\u6f22\u5b57\u3000x", "x\u00a0y", "\u2028\x85", "\x00\x7f", "<eos> </s> <|endoftext|>",
]  # fmt: skip


def samples() -> list[str]:
    """Returns texts to be compared: whole pages, their lines, and the odd ones."""
    return [*PAGES[::3], *(line for page in PAGES[::5] for line in page.splitlines()), *ODD]


@functools.cache
def ranks() -> dict[bytes, int]:
    """Returns the ranks of a vocabulary that is trained here."""
    vocab: dict[str, int] = json.loads(train_bpe(PAGES[:6], 900).to_json())["model"]["vocab"]
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    names = sorted(vocab, key=vocab.__getitem__)[2:]
    return {bytes(byte_of[letter] for letter in name): rank for rank, name in enumerate(names)}


def rank_file(content: dict[bytes, int]) -> bytes:
    """Returns the file that tiktoken would read."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in content.items())


@functools.cache
def sentencepiece_model(kind: str, **options: Any) -> bytes:
    """Returns a model of SentencePiece that is trained here."""
    import sentencepiece

    lines = [line for page in PAGES for line in page.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=900, model_type=kind, num_threads=1,
        minloglevel=2, **{"character_coverage": 0.999, **options},
    )  # fmt: skip
    return model.getvalue()
