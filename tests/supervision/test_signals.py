"""The first signal in training requests a stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import cast

import lightning as L
import pytest

from pkm_lightning.supervision.signals import exit_code, stop_on_signals


def trainer_in(state: str) -> L.Trainer:
    trainer = SimpleNamespace(state=SimpleNamespace(fn=state), _signal_connector=SimpleNamespace())
    return cast(L.Trainer, trainer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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
