"""Signs of life from work that takes long: nothing in the first seconds, then a line now and then."""

from __future__ import annotations

import time

SECONDS = 10.0


class Heartbeat:
    """A clock by which lines are due now and then.

    Args:
        first: seconds until the first line; then one is due every 10 s.
    """

    def __init__(self, first: float = SECONDS) -> None:
        self._began = time.monotonic()
        self._next = self._began + first

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def is_due(self) -> bool:
        """Returns whether a line is due, and counts on from now if so."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + SECONDS
        return True
