"""Seconds that add up over stops and resumes."""

from __future__ import annotations

import time


class Stopwatch:
    """Starts stopped; `seconds` may be read at any time.

    Args:
        seconds: what an earlier run had on the clock.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started: float | None = None

    def start(self) -> None:
        """Runs from here on; no effect while running."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stands still; no effect while stopped."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Total running time so far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)
