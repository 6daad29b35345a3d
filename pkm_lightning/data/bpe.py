"""Learns the vocabulary of a byte-level BPE, in another process where it takes more than a moment.

So SIGINT and SIGTERM end it at once, and its progress is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO

from tokenizers import Tokenizer as Backend

from pkm_lightning.data import bpe_process
from pkm_lightning.data.chunks import learnable
from pkm_lightning.data.heartbeat import Heartbeat
from pkm_lightning.errors import DataError

#: Text that is learned from within a moment.
MOMENT_CHARACTERS = 300_000
#: Seconds between looks at the time while the other process learns.
WAIT = 1.0

log = logging.getLogger(__name__)


def learn_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), normalization: str | None = None
) -> Backend:
    """Returns a BPE trained on `texts`; equal texts in equal order give an equal one.

    For the arguments see `bpe_process.learn`.

    Raises:
        DataError: the process that trains it was killed, or ran out of memory.
    """
    rest = learnable(texts)
    first: list[str] = []
    size = 0
    for text in rest:
        first.append(text)
        size += len(text)
        if size > MOMENT_CHARACTERS:
            options = {"special_tokens": list(special_tokens), "normalization": normalization}
            return _learn_in_process(chain(first, rest), vocab_size, json.dumps(options))
    return bpe_process.learn(first, vocab_size, special_tokens, normalization)


def _learn_in_process(texts: Iterator[str], vocab_size: int, options: str) -> Backend:
    command = [sys.executable, "-P", bpe_process.__file__, str(vocab_size), options]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        # A session of its own: Ctrl-C reaches this process alone, which ends the other in an orderly way.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=errors, start_new_session=True)
        assert process.stdin is not None
        try:
            _feed(process, process.stdin, texts, vocab_size)
        except BrokenPipeError:
            process.wait()
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            lines = errors.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), "out of memory, or killed")
            raise DataError(
                f"data.tokenizer=bpe: the process that trains it ended with exit code {process.returncode} ({reason}); "
                "start again, give it more memory, or set data.tokenizer=bytes."
            )
        return Backend.from_str(output.read().decode())


def _feed(process: subprocess.Popen[bytes], pipe: IO[bytes], texts: Iterator[str], vocab_size: int) -> None:
    """Sends the texts and waits for the end of the training."""
    heartbeat = Heartbeat()
    size = 0
    for text in texts:
        pipe.write(json.dumps(text).encode() + b"\n")
        size += len(text)
        if heartbeat.is_due():
            log.info("data.tokenizer=bpe: read %.1f million characters in %.0f s.", size / 1e6, heartbeat.seconds)
    pipe.write(b"\n")
    pipe.flush()
    while True:
        try:
            process.wait(timeout=WAIT)
            return
        except subprocess.TimeoutExpired:
            if heartbeat.is_due():
                log.info(
                    "data.tokenizer=bpe: learns %d tokens from %.1f million characters, %.0f s so far.",
                    vocab_size,
                    size / 1e6,
                    heartbeat.seconds,
                )
