"""The training of a byte-level BPE, which is also a program, so that it can be stopped.

The library trains for minutes without a look at signals. As a program, `bpe_process.py VOCAB_SIZE` reads one JSON text
per line up to an empty line and writes a tokenizer.json. It imports nothing of this package, so that it starts in a
moment, and it ends when its standard input closes, which happens at the latest when its parent dies.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, EOS = "<pad>", "<eos>"


def byte_level(model: models.BPE) -> Backend:
    """Returns an encoder of bytes with the merges of `model`."""
    backend = Backend(model)
    # No space is added before a text: an answer brings its own, and a document may begin without one.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def alphabet() -> list[str]:
    """Returns the letters that stand for the 256 bytes; the library gives them in another order at every call."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def learn(texts: Iterable[str], vocab_size: int) -> Backend:
    """Returns a BPE trained on `texts`; equal texts in equal order give an equal one."""
    backend = byte_level(models.BPE())
    # The alphabet holds all 256 bytes, also those that do not occur in `texts`: any other text must be representable.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet(), show_progress=False
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
    sys.stdout.write(learn(_texts(), int(sys.argv[1])).to_str())
    sys.stdout.flush()
    # Without the end of the interpreter, which would wait for the thread's lock on standard input.
    os._exit(0)
