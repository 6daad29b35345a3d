"""`generate` and `chat` in a terminal, as processes: words appear as they are written, Ctrl-C ends an answer."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: Random tokens, of which hardly any ends the answer.
ENDLESS = ("temperature=9", "max_new_tokens=1000000", "extrapolate=true", "run_dir=run")


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "pkm_lightning", *arguments]
        self.process = subprocess.Popen(command, cwd=cwd, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown, self._read = "", 0

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def wait_for(self, text: str, more: int = 0) -> None:
        """Reads until `text` has appeared after what was waited for before, and `more` characters after it."""
        deadline = time.monotonic() + 120
        while (place := self.shown.find(text, self._read)) < 0 or len(self.shown) < place + len(text) + more:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 1)[0]:
                self.shown += os.read(self._master, 2**16).decode(errors="replace")
        self._read = place + len(text)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Reads to the end; returns the exit code."""
        try:
            while True:
                self.shown += os.read(self._master, 2**16).decode(errors="replace")
        except OSError:  # the other end of a terminal is closed
            os.close(self._master)
        return self.process.wait(60)


@pytest.mark.slow
def test_chat_streams_and_an_interruption_ends_the_answer_alone(trained: Path) -> None:
    terminal = Terminal("chat", *ENDLESS, cwd=trained.parent)
    terminal.wait_for("> ")
    terminal.interrupt()
    terminal.wait_for("/exit or Ctrl-D ends the conversation.")
    terminal.wait_for("> ")
    terminal.type("Who was")
    terminal.wait_for("Who was\r\n", more=20)
    assert terminal.process.poll() is None
    terminal.interrupt()
    terminal.wait_for("> ")
    terminal.type("/exit")
    assert terminal.end() == 0
    assert "ended: 1 interrupted" in terminal.shown


@pytest.mark.slow
def test_generate_streams_and_keeps_what_was_written(trained: Path) -> None:
    terminal = Terminal("generate", *ENDLESS, "prompt=Who was", "out=a.jsonl", cwd=trained.parent)
    terminal.wait_for("Who was", more=20)
    terminal.interrupt()
    assert terminal.end() == 130
    assert "interrupted; the answers end where they were" in terminal.shown
    (line,) = (trained.parent / "a.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["ended"] == "interrupted"
    assert record["tokens"] > 2
    assert record["answer"].split()[0] in terminal.shown
