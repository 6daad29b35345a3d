"""`python -m pkm_lightning VERB [hydra overrides]`, and the command `pkm-lightning`."""

import atexit
import contextlib
import gc
import io
import os
import sys
import threading

from pkm_lightning.cli.main import main


def run() -> None:
    """Runs the command line of this process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without Unicode shows what it lacks as \\uXXXX.
            stream.reconfigure(errors="backslashreplace")
    # Importing torch and Lightning makes a million objects, all of which stay: collections in between take a quarter of
    # the time of a short verb. `main` enables them before the verb runs.
    gc.disable()
    try:
        main()
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if "torch" not in sys.modules or isinstance(end.code, str):
            raise
        _leave(end.code or 0)


def _leave(code: int) -> None:
    """Ends the process as the interpreter would, but without taking apart what is imported: 2 to 4 s of a processor."""
    # What Python 3.11 to 3.14 do first, too: wait for threads that are no daemons, then call what is registered.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
