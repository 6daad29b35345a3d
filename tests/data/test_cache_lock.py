"""Waiting for the lock of a cache folder: the log names its holder, and a signal ends the wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pkm_lightning.data import cache_lock as module
from pkm_lightning.data.cache_lock import cache_lock

HOLDER = """
import sys, time
from pathlib import Path
from pkm_lightning.data.cache_lock import cache_lock
with cache_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT", 0.1)


@pytest.fixture
def suspended(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds the lock in a process that is stopped, as Ctrl-Z does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def interrupt(caplog: pytest.LogCaptureFixture) -> None:
    """Sends SIGINT to this process once the waiting has been logged."""
    while "waits for" not in caplog.text:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_suspended_holder_is_named_and_waiting_can_be_stopped(
    tmp_path: Path, suspended: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    threading.Thread(target=interrupt, args=[caplog]).start()
    with pytest.raises(KeyboardInterrupt), cache_lock(tmp_path / "lock"):
        raise AssertionError("the lock is held")
    holder = f"process {suspended.pid} on {socket.gethostname()}, which has prepared the same data since 20"
    assert f"waits for {holder}" in caplog.text
    assert f"and is suspended: kill -CONT {suspended.pid} lets it go on" in caplog.text
    suspended.kill()
    with cache_lock(tmp_path / "lock"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text(), "the lock of a dead process is free"


def test_a_short_wait_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with cache_lock(tmp_path / "lock"):
        waiter = threading.Thread(target=lambda: cache_lock(tmp_path / "lock").__enter__())
        waiter.start()
    waiter.join(timeout=10)
    assert not waiter.is_alive()
    assert caplog.text == ""


def test_a_holder_that_has_not_said_who_it_is_is_another_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cache_lock(tmp_path / "lock"):
        (tmp_path / "lock").write_text("[]")
        threading.Thread(target=interrupt, args=[caplog]).start()
        with pytest.raises(KeyboardInterrupt), cache_lock(tmp_path / "lock"):
            raise AssertionError("the lock is held")
    assert "waits for another process" in caplog.text
