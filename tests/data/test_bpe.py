"""Learning a BPE: in this process or in another one it is the same, and the other one can be stopped and be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pkm_lightning.data import bpe, bpe_process
from pkm_lightning.data.bpe import learn_bpe
from pkm_lightning.data.heartbeat import Heartbeat
from pkm_lightning.errors import DataError

TEXTS = [f"Sentence {i} of the story \ud55c\uad6d\u2028 has a number {i * i}.\n" for i in range(300)]


class Started:
    """The process that was started last."""

    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def wait(cls) -> subprocess.Popen[bytes]:
        while cls.process is None:
            time.sleep(0.01)
        return cls.process


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Started]]:
    start = subprocess.Popen

    def remember(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        Started.process = start(*args, **kwargs)  # type: ignore[call-overload]
        return Started.process

    Started.process = None
    monkeypatch.setattr(bpe.subprocess, "Popen", remember)
    yield Started
    assert Started.process is None or Started.process.poll() is not None, "the process must have ended"


def test_both_ways_learn_the_same(monkeypatch: pytest.MonkeyPatch, started: type[Started]) -> None:
    here = learn_bpe(TEXTS, 500)
    assert started.process is None
    monkeypatch.setattr(bpe, "MOMENT_CHARACTERS", 100)
    assert learn_bpe(iter(TEXTS), 500).to_str() == here.to_str()
    assert started.process is not None


def endless() -> Iterator[str]:
    while True:
        yield "word "


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(number: int, started: type[Started]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        threading.Thread(target=lambda: started.wait() and os.kill(os.getpid(), number)).start()
        with pytest.raises(KeyboardInterrupt):
            learn_bpe(endless(), 500)
    finally:
        signal.signal(number, before)


def test_a_killed_process_is_reported(started: type[Started]) -> None:
    threading.Thread(target=lambda: started.wait().kill()).start()
    with pytest.raises(
        DataError, match=r"data\.tokenizer=bpe: the process .* exit code -9 \(out of memory, or killed\)"
    ):
        learn_bpe(endless(), 500)


def test_errors_of_the_files_and_of_the_process_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[str]:
        yield "word " * 100_000
        raise DataError("a.txt is not UTF-8")

    with pytest.raises(DataError, match=r"^a\.txt is not UTF-8"):
        learn_bpe(broken(), 500)
    monkeypatch.setattr(bpe, "MOMENT_CHARACTERS", 100)
    with pytest.raises(DataError, match=r"exit code 1 \(ValueError: invalid literal for int\(\) .*'many'\)"):
        learn_bpe(TEXTS, "many")  # type: ignore[arg-type]


@pytest.mark.parametrize("sent", [b'"a b"\n', b'"a b"\n\n'])
def test_the_process_ends_with_its_parent(sent: bytes) -> None:
    # A vocabulary that would take minutes, were the end of standard input not noticed.
    sent = sent if sent == b'"a b"\n' else json.dumps(" ".join(map(str, range(400_000)))).encode() + b"\n\n"
    command = [sys.executable, "-P", bpe_process.__file__, "200000"]
    process = subprocess.run(command, input=sent, capture_output=True, timeout=60, check=False)
    assert (process.returncode, process.stdout) == (1, b"")


def test_a_long_training_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Heartbeat, "is_due", lambda _: True)
    monkeypatch.setattr(bpe, "MOMENT_CHARACTERS", 100)
    monkeypatch.setattr(bpe, "WAIT", 0.001)
    learn_bpe(TEXTS, 500)
    assert "data.tokenizer=bpe: read 0.0 million characters" in caplog.text
    assert "learns 500 tokens from 0.0 million characters" in caplog.text
