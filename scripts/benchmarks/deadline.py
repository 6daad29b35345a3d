"""The time that a benchmark may take: what has not begun by then is named as not run."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """A number of seconds from now on.

    Args:
        seconds: None: no end.
        now: the clock, in seconds.
    """

    def __init__(self, seconds: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now, self._start = seconds, now, now()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def has_passed(self) -> bool:
        """Whether nothing more may begin."""
        return self._seconds is not None and self.elapsed >= self._seconds
