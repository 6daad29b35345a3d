"""The training of a byte-level BPE, which is also a program, so that it can be stopped.

The library trains for minutes without a look at signals. As a program, `bpe_process.py VOCAB_SIZE [OPTIONS]` reads one
JSON text per line up to an empty line and writes a tokenizer.json; OPTIONS is the JSON of further arguments of `learn`.
It imports nothing of this package, so that it starts in a moment, and it ends when its standard input closes, which
happens at the latest when its parent dies.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

PAD, EOS = "<pad>", "<eos>"

#: What is done to a text before it is cut into bytes, by the values of `data.normalization`.
NORMALIZATIONS: dict[str, list[normalizers.Normalizer]] = {
    "nfc": [normalizers.NFC()],
    "nfkc": [normalizers.NFKC()],
    "lowercase": [normalizers.NFC(), normalizers.Lowercase()],
    "nfkc_lowercase": [normalizers.NFKC(), normalizers.Lowercase()],
}


def byte_level(model: models.BPE, normalization: str | None = None) -> Backend:
    """Returns an encoder of bytes with the merges of `model`; see `NORMALIZATIONS`."""
    backend = Backend(model)
    if normalization is not None:
        backend.normalizer = normalizers.Sequence(NORMALIZATIONS[normalization])
    # No space is added before a text: an answer brings its own, and a document may begin without one.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def alphabet() -> list[str]:
    """Returns the letters that stand for the 256 bytes; the library gives them in another order at every call."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_letters() -> list[str]:
    """Returns the letter that stands for each byte: itself where it can be printed, else one from U+0100 on."""
    letters = alphabet()
    printable = {ord(letter) for letter in letters if ord(letter) < 256}
    others = iter(letter for letter in letters if ord(letter) >= 256)
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def learn(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), normalization: str | None = None
) -> Backend:
    """Returns a BPE trained on `texts`; equal texts in equal order give an equal one.

    Args:
        texts: to learn from.
        vocab_size: of all tokens.
        special_tokens: names of control tokens beside `PAD` and `EOS`.
        normalization: of `NORMALIZATIONS`.
    """
    backend = byte_level(models.BPE(), normalization)
    # The alphabet holds all 256 bytes, also those that do not occur in `texts`: any other text must be representable.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *special_tokens],
        initial_alphabet=alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend


def _texts() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if line == b"\n":
            threading.Thread(target=_end_with_parent, daemon=True).start()
            return
        yield json.loads(line)
    os._exit(1)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    sys.stdout.write(learn(_texts(), int(sys.argv[1]), **options).to_str())
    sys.stdout.flush()
    # Without the end of the interpreter, which would wait for the thread's lock on standard input.
    os._exit(0)
