"""Display of an answer while it is written."""

from __future__ import annotations

from collections.abc import Sequence

from pkm_lightning.inference.generation import Answer


class Streamer:
    """Prints each part of one answer once no further token can change it.

    Args:
        stop: texts that end the answer, of which no beginning is shown.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._shown = stop, 0

    def __call__(self, answer: Answer) -> None:
        """Prints what is new."""
        text = answer.settled(self._stop)
        # Flushed: a reader waits for words, not for lines.
        print(text[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(text))
