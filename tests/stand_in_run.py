"""Stands for `fit` in tests of the processes of a comparison: does what its first argument names."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

#: Set while this module is imported: in a forked run, in the server.
IMPORTED_IN = os.getpid()


def _stop(number: int, frame: FrameType | None) -> None:
    time.sleep(0.3)  # a checkpoint is written
    print("stopped in order", flush=True)
    sys.exit(143)


def _main(what: str) -> None:
    if what == "fine":
        print("all good")
    elif what == "threads":
        print(os.environ["OMP_NUM_THREADS"])
    elif what == "wrong":
        print("error: no such thing")
        sys.exit(2)
    elif what == "raises":
        raise ValueError("no such value")
    elif what == "crash":
        print("on it", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "silent":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "slow":
        signal.signal(signal.SIGTERM, _stop)
        print("started", flush=True)
        time.sleep(60)
    elif what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("started", flush=True)
        time.sleep(60)
    elif what == "place":
        # What a process is to the system: its command, its session, its input and output, its handlers.
        shown = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").split(b"\0") if sys.platform == "linux" else []
        print([os.fsdecode(argument) for argument in shown[1:]])
        leads = os.getsid(0) == os.getpid()
        ends = int(signal.getsignal(signal.SIGTERM))
        print(leads, sys.stdin.read() == "", os.isatty(1), sys.argv[1:], __name__, ends)


if __name__ == "__main__":
    _main(sys.argv[1])
