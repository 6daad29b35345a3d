"""A process that has imported what runs need and forks each of them, so that a comparison pays for imports once.

Importing torch, Lightning and Hydra takes seconds of a run that may train for less. A forked run has a process,
session, log and exit code, as one that `python -m pkm_lightning` starts, and is the same to the bit: before a fork the
server has imported modules and done nothing else, so no random number was drawn, no thread pool of torch or numba was
started and no GPU was touched. Threads are those of the OMP_NUM_THREADS that the server was started with.

The comparison and the server talk in lines of JSON over a pair of sockets, which is the server's standard input:

| from | line | meaning |
|---|---|---|
| comparison | {"run": 3, "module": "pkm_lightning", "arguments": [...], "log": PATH} | fork run 3 |
| comparison | {"run": 3, "signal": 15, "group": false} | send a signal to it, or to its session |
| server | {"run": 3, "pid": 4242} | it has been forked |
| server | {"run": 3, "exit": 0} | it has ended; below 0: the negated number of the signal that ended it |

The server ends with the comparison, even one that was killed, and the kernel then sends SIGTERM to the runs. Where the
server alone has ended, a run counts as ended when its process has, which may write its checkpoint first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The server forks on Linux only: libraries of macOS do not survive a fork, and only Linux signals orphans.
CAN_FORK = sys.platform == "linux"
# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1
# Blanks at the end of the server's command line, which make room for that of a run.
_ROOM = 4096
# Seconds between looks for runs that have ended, while the comparison asks for nothing.
_REAP = 0.1
# Signals that a terminal or a scheduler sends to every process of a command: the server ends with the comparison.
_LEFT_TO_THE_COMPARISON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class ForkedRun:
    """The process of a run as its comparison sees it, with the methods of `subprocess.Popen` that `Processes` uses.

    Attributes:
        returncode: None until `poll` or `wait` has seen its end; below 0 the negated number of a signal.
    """

    def __init__(self, server: ForkServer, number: int) -> None:
        self._server, self.number = server, number
        self.returncode: int | None = None
        self._pid = 0
        # A file descriptor that stands for the process, whoever its parent is, and is readable when it has ended.
        self._process: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs; where the server has ended alone, that of the server."""
        if self.returncode is None:
            self._server.receive()
        return self.returncode

    def begin(self, pid: int) -> None:
        """Takes the number of its process."""
        self._pid = pid
        # Old kernels, sandboxes and some builds of Python have none: the run then counts as ended with its server.
        with contextlib.suppress(OSError, AttributeError):
            self._process = os.pidfd_open(pid)

    def end(self, code: int) -> None:
        """Takes its exit code."""
        self.returncode = code
        if self._process is not None:
            os.close(self._process)
            self._process = None

    @property
    def has_process(self) -> bool:
        """Whether its process has begun and not ended."""
        return self._process is not None and not select.select([self._process], [], [], 0)[0]

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: it runs on after `timeout` seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("fit", timeout or 0.0)
            time.sleep(_REAP / 2)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self._signal(signal.SIGTERM, group=False)

    def kill_session(self) -> None:
        """Sends SIGKILL to it and all that it has started."""
        self._signal(signal.SIGKILL, group=True)

    def _signal(self, number: signal.Signals, group: bool) -> None:
        if self._server.is_alive:
            self._server.send({"run": self.number, "signal": int(number), "group": group})
        elif self.has_process:
            _signal({self._pid: self.number}, {"run": self.number, "signal": int(number), "group": group})


class ForkServer:
    """The comparison's end of a server, which is started here.

    Args:
        modules: names of modules to import, first.
        environment: of the server and of all runs.
        log: file of what the server itself prints.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *modules, " " * _ROOM],
                stdin=theirs.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self._socket, self._unread = ours, b""
        self._runs: dict[int, ForkedRun] = {}
        self._number = 0
        self._exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it can start further runs."""
        return self._process.poll() is None

    def start(self, module: str, arguments: Sequence[str], log: Path) -> ForkedRun:
        """Starts what `python -m MODULE ARGUMENTS` would start, its output appended to `log`."""
        self._number += 1
        run = self._runs[self._number] = ForkedRun(self, self._number)
        self.send({"run": run.number, "module": module, "arguments": list(arguments), "log": str(log)})
        return run

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a line; a server that has ended gets none."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> None:
        """Takes in what the server has sent; runs that outlive a killed server end with its exit code."""
        while self._runs and self._exit_code is None and select.select([self._socket], [], [], 0)[0]:
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                self._exit_code = self._process.wait() or 1
                self._socket.close()
            *lines, self._unread = (self._unread + data).split(b"\n")
            for message in map(json.loads, lines):
                if "pid" in message:
                    self._runs[message["run"]].begin(message["pid"])
                else:
                    self._runs.pop(message["run"]).end(message["exit"])
        if self._exit_code is not None:
            for run in [run for run in self._runs.values() if not run.has_process]:
                self._runs.pop(run.number).end(self._exit_code)

    def close(self) -> None:
        """Ends the server, whose runs have ended."""
        self._socket.close()
        self._process.wait()


def stop_with_parent() -> None:
    """Asks the kernel to send this process SIGTERM when its parent dies: a run must not go on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _serve() -> dict[str, Any] | None:
    """Forks runs until the comparison hangs up; returns None then, and in the process of a run its message."""
    # Blocked, not ignored: a signal that reaches a run before it has unblocked them waits, and is not lost.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_COMPARISON)
    server, unread = os.getpid(), b""
    runs: dict[int, int] = {}
    while True:
        if select.select([0], [], [], _REAP if runs else None)[0]:
            data = os.read(0, 65536)
            if not data:
                return None
            *lines, unread = (unread + data).split(b"\n")
            for message in map(json.loads, lines):
                if "signal" in message:
                    _signal(runs, message)
                    continue
                pid = os.fork()
                if pid == 0:
                    _become_run(server, message)
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                    return dict(message)
                runs[pid] = message["run"]
                _answer({"run": message["run"], "pid": pid})
        while runs and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _answer({"run": runs.pop(ended[0]), "exit": os.waitstatus_to_exitcode(ended[1])})


def _answer(message: Mapping[str, int]) -> None:
    # The comparison may be gone: the next look at the socket sees that.
    with contextlib.suppress(OSError):
        os.write(0, json.dumps(message).encode() + b"\n")


def _signal(runs: Mapping[int, int], message: Mapping[str, Any]) -> None:
    # A run that has been waited for is not among `runs`, so its number cannot be that of another process by now.
    for pid, run in runs.items():
        if run == message["run"]:
            with contextlib.suppress(ProcessLookupError):
                if message["group"] and os.getpgid(pid) == pid:
                    os.killpg(pid, message["signal"])
                else:  # also a run that has no session of its own yet
                    os.kill(pid, message["signal"])


def _become_run(server: int, message: Mapping[str, Any]) -> None:
    """Gives the forked process what a started one has: a session, no input, its log, and an end with its parent."""
    os.setsid()
    _show_as([sys.executable, "-m", message["module"], *message["arguments"]])
    stop_with_parent()
    if os.getppid() != server:  # it died before the kernel was asked
        os._exit(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    output = os.open(message["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, target in ((nowhere, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nowhere)
    os.close(output)


def _show_as(command: Sequence[str]) -> None:
    """Makes `ps` show `command` for this process, cut off where its own command line ends."""
    # proc(5): arg_start and arg_end are fields 48 and 49, of which the name in brackets is the second.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(map(os.fsencode, command))[: max(0, end - start - 1)]
    if text:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def main() -> None:
    """Imports the modules that the command line names, and serves; in the process of a run, is that run."""
    gc.disable()  # as `pkm_lightning.__main__` does while it imports
    _show_as([sys.executable, "-m", "pkm_lightning.compare.fork_server"])
    for name in sys.argv[1:-1]:
        with contextlib.suppress(ImportError):  # a run that needs it ends with a message
            importlib.import_module(name)
    # What is there by now stays: a collection in a run that walked over it would copy its pages.
    gc.freeze()
    message = _serve()
    if message is None:
        os._exit(0)  # with nothing to close; taking the interpreter apart takes a second
    sys.argv[1:] = message["arguments"]
    runpy.run_module(message["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
