"""What a benchmark compares: ways of doing one thing at one size, and the rows of a plan.

Every way is checked against a float64 computation before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.deadline import Deadline

Run = Callable[[], Any]


class Way(NamedTuple):
    """One contender: `build` prepares everything that is not timed and returns the function that is."""

    name: str
    build: Callable[[], Run]


@dataclass(kw_only=True)
class Case:
    """A task at one size, with the ways of doing it.

    Args:
        sizes: the size in words.
        ways: the contenders.
        error: runs what a way built and returns its relative error against float64.
        tolerance: a larger error disqualifies the way.
        baselines: ways whose medians and memory the others' are divided by.
        peers: ways that are not this package's: that one cannot run here is shown, and is no failure.
        moved: bytes that any way must move, 0 where bandwidth is no useful measure.
        tokens: tokens of one call, for the time per token.
        calls: calls per measurement; short ones need several.
        rebuild: build a way anew in each round, where all of them do not fit into memory together.
        clock: measures a call itself and returns seconds; None: wall clock, or CUDA events.
        memory: whether to measure peak memory.
        timed: whether to check and time the ways.
        held: bytes of the inputs that count as the way's own in peak memory.
        values: values of the table, for bytes per value.
    """

    sizes: str
    ways: list[Way]
    error: Callable[[Any], float]
    tolerance: float
    baselines: Sequence[str] = ()
    peers: Sequence[str] = ()
    moved: float = 0.0
    tokens: int = 0
    calls: int = 1
    rebuild: bool = False
    clock: Callable[[Run], float] | None = None
    memory: bool = True
    timed: bool = True
    held: int = 0
    values: int = 0


class Skipped(NamedTuple):
    """Replaces a case that cannot run here."""

    reason: str


#: Makes a case with all its inputs; it pickles, so that another process can make the case too.
Factory = Callable[[], Case | Skipped]


class Row(NamedTuple):
    """A line of a plan.

    Args:
        name: what is done.
        make: makes the case.
        make_tiny: makes a tiny case of the same ways.
        make_half: makes the case with half the table, whose difference in memory gives the bytes per value.
        sizes: the size in words, known before the case is made.
    """

    name: str
    make: Factory
    make_tiny: Factory
    make_half: Factory | None = None
    sizes: str = ""

    @property
    def title(self) -> str:
        """What is done and at which size."""
        return f"{self.name}: {self.sizes}" if self.sizes else self.name


class Options(NamedTuple):
    """Options of the command line."""

    device: torch.device
    smoke: bool
    rounds: int
    memory: bool
    #: Measure CPU time instead of the time that passes.
    cpu_time: bool = False
    deadline: Deadline = Deadline()


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest |result - expected| / |expected| (L2 norms) over the tensors; infinite if one is not finite.

    A norm tolerates the one id of a top-k that a near tie decides otherwise, and reveals wrong rows or weights.
    """
    worst = 0.0
    for ours, theirs in zip(results, expected, strict=True):
        theirs = theirs.double()
        error = ((ours.detach().double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst
