"""Turns the signals that ask a process to stop into a request for a checkpoint, and into an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence

import lightning as L

# SLURM sends SIGUSR1 to a job where it was asked to warn of the end; Lightning's own handler for it writes a checkpoint
# that every later start prefers to newer ones. SIGHUP arrives when the terminal is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def stop_on_signals(trainer: L.Trainer, request_stop: Callable[[str], None] | None) -> Iterator[None]:
    """Handles SIGINT, SIGTERM, SIGUSR1 and SIGHUP within the block, for a process that trains or evaluates.

    Args:
        trainer: in training the first signal calls `request_stop`.
        request_stop: gets the signal's name; saves a checkpoint at the end of the step and then ends training. None
            where no checkpoints are written.

    Raises:
        KeyboardInterrupt: with the signal's name; at a second signal, outside training, or without `request_stop`.
    """
    requested = False

    def handle(number: int) -> None:
        nonlocal requested
        name = signal.Signals(number).name
        if requested or request_stop is None or trainer.state.fn != "fit":
            raise KeyboardInterrupt(name)
        requested = True
        request_stop(name)

    # Lightning 2.6's handler of SIGTERM broadcasts in the middle of a step, which the other ranks do not expect.
    trainer._signal_connector.register_signal_handlers = _register_none  # type: ignore[method-assign]
    with handled_signals(handle):
        yield


@contextlib.contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls `handle` with the number of each signal that asks a process to stop, within the block.

    SIGHUP stays ignored where it is, as under nohup; else the output goes nowhere once the terminal is closed.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            _silence(terminals)
        handle(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _register_none() -> None:
    """Replaces the method by which Lightning would register handlers over those of `stop_on_signals`."""


def _silence(terminals: Sequence[int]) -> None:
    """Sends the output to nowhere: a progress bar on a closed terminal would fail before the checkpoint is written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in terminals:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def exit_code(stop: BaseException) -> int:
    """Returns 128 plus the number of the signal that `stop` names, as shells do; SIGINT where it names none.

    Args:
        stop: the exception of a handler, or one that was raised while that was handled.
    """
    error: BaseException | None = stop
    # Lightning turns a KeyboardInterrupt inside the Trainer into a SystemExit, which names no signal.
    while error is not None:
        for number in _SIGNALS:
            if number.name == str(error):
                return 128 + number
        error = error.__context__
    return 128 + signal.SIGINT
