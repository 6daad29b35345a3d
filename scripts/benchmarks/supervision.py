"""A benchmark whose rows may end the process that measures them: another process goes on after such a row.

The two share a file of JSON lines, the records: `plan` with the titles of all rows, `begin` with the row that begins,
`end` with its results, and `done`.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(records: Path, event: str, value: object) -> None:
    """Adds an event to the records."""
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps({event: value}) + "\n")


def events(records: Path, event: str) -> list[Any]:
    """Returns the values of all events of this name, in their order."""
    if not records.exists():
        return []
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    return [line[event] for line in lines if event in line]


def supervise(command: Sequence[str], records: Path, seconds: float, grace: float) -> int:
    """Runs `command` until all rows are done; returns the exit code of the benchmark.

    The command gets `--seconds` with the time that is left and `--records`. It skips as many rows as have ended.

    Args:
        command: measures the rows.
        records: the file, which does not exist yet.
        seconds: time of all processes together.
        grace: seconds after which the last row is stopped.
    """
    start = time.monotonic()
    while True:
        left = max(0.0, seconds - (time.monotonic() - start))
        ended = len(events(records, "end"))
        process = subprocess.Popen([*command, "--seconds", f"{left:.1f}", "--records", str(records)])
        try:
            code = process.wait(left + grace)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()  # has no effect on a process that has ended
            process.wait()
        if events(records, "done"):
            assert code is not None
            return code
        begun, titles = events(records, "begin"), events(records, "plan")
        if code is None:
            title = titles[0][len(begun) - 1] if begun and titles else "the start"
            print(f"\nstopped in {title}: {seconds + grace:.0f} s are over", flush=True)
            print("\nnot run:", *(titles[0][len(begun) :] if titles else ()), sep="\n  ", flush=True)
            return 1
        if len(begun) > len(events(records, "end")):
            row = begun[-1]
            status = f"ended its process with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
            print(f"\n{titles[0][len(begun) - 1]}: {status}", flush=True)
            append(records, "end", [{**row, "status": status}])
        elif len(events(records, "end")) == ended:
            return code or 1  # it measures nothing; the process printed the reason
