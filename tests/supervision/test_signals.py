"""The first signal in training requests a stop, the second ends the process at once."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from types import SimpleNamespace
from typing import cast

import lightning as L
import pytest

from pkm_lightning.supervision.signals import exit_code, stop_on_signals


def trainer_in(state: str) -> L.Trainer:
    trainer = SimpleNamespace(state=SimpleNamespace(fn=state), _signal_connector=SimpleNamespace())
    return cast(L.Trainer, trainer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_in_training(number: signal.Signals) -> None:
    before, requests = signal.getsignal(number), list[str]()
    with stop_on_signals(trainer_in("fit"), requests.append):
        os.kill(os.getpid(), number)
        assert requests == [number.name]
        with pytest.raises(KeyboardInterrupt) as stop:
            os.kill(os.getpid(), number)
    assert requests == [number.name]
    assert exit_code(stop.value) == 128 + number
    assert signal.getsignal(number) is before


def test_signals_without_training_or_checkpoints_stop_at_once() -> None:
    for trainer, request_stop in ((trainer_in("test"), pytest.fail), (trainer_in("fit"), None)):
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), stop_on_signals(trainer, request_stop):
            os.kill(os.getpid(), signal.SIGTERM)
    assert exit_code(KeyboardInterrupt()) == 130


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(trainer_in("fit"), pytest.fail):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_code_survives_the_way_through_lightning() -> None:
    """Lightning answers KeyboardInterrupt by sys.exit(1) while it handles it."""

    def lightning() -> None:
        try:
            raise KeyboardInterrupt("SIGTERM")
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as stop:
        lightning()
    assert exit_code(stop.value) == 143


def test_a_closed_terminal_does_not_stop_the_last_step() -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    process, terminal = pty.fork()
    if process == 0:
        code, requests = 1, list[str]()
        try:
            with stop_on_signals(trainer_in("fit"), requests.append):
                os.write(1, b"ready")
                while not requests:
                    time.sleep(0.01)  # `pause` would wait for ever if the signal came just before it
                os.write(1, b"progress")
                os.write(2, b"progress")
                code = 0 if requests == ["SIGHUP"] else 2
        finally:
            os._exit(code)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
