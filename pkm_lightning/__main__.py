"""`python -m pkm_lightning VERB [hydra overrides]`, and the command `pkm-lightning`."""

import gc
import io
import os
import sys

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
    verb = sys.argv[1] if len(sys.argv) > 1 else None
    # Importing torch and Lightning makes a million objects, all of which stay: collections in between take a quarter of
    # the time of a short verb. `main` enables them before the verb runs.
    gc.disable()
    try:
        main()
    except KeyboardInterrupt:  # while torch is imported, which takes seconds
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if verb != "info":
            raise
        # It leaves nothing to close, and taking the interpreter apart would take as long again as its figures.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    run()
