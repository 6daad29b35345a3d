"""Errors that a user can correct: one sentence with the value, where it came from, what is allowed and what to do.

The command line prints them without a traceback; a program that imports the package can catch `PkmError`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class PkmError(Exception):
    """Base class of the errors that a user can correct.

    Example:
        >>> from pkm_lightning import PkmError
        >>> issubclass(PkmError, PkmError)
        True
    """


class ConfigError(PkmError, ValueError):
    """A configuration value, key or combination that cannot work.

    Example:
        >>> from pkm_lightning import ConfigError, PkmError
        >>> issubclass(ConfigError, PkmError)
        True
    """


class DataError(PkmError, ValueError):
    """Missing, empty or unreadable data.

    Example:
        >>> from pkm_lightning import DataError, PkmError
        >>> issubclass(DataError, PkmError)
        True
    """


class CheckpointError(PkmError, RuntimeError):
    """A checkpoint that is missing, damaged or not written by this package.

    Example:
        >>> from pkm_lightning import CheckpointError, PkmError
        >>> issubclass(CheckpointError, PkmError)
        True
    """


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint that could not be written: the disk is full, or the folder cannot be written."""


class RunDirectoryError(PkmError, OSError):
    """A run directory that cannot be used: unwritable, full, held by another process, or already finished."""


class InstabilityError(PkmError, RuntimeError):
    """Training that became unstable, where the policy was to stop or its countermeasures failed."""


class RankLostError(PkmError, RuntimeError):
    """The loss of another process of the run, which can be continued.

    Args:
        message: names the rank and the way it was lost.
        exit_code: of the processes that end because of it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Exception):
    """The orderly end of a job that was asked to stop or lost one of its processes; nothing is left half-written."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` with the choice closest in spelling to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def counted(n: int, noun: str) -> str:
    """Returns a number with its noun, such as `1 file` or `1,000 files`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Refuses a `value` of `key` that is not among `allowed`.

    Raises:
        ConfigError: naming the key, the value, the allowed values and the nearest spelling.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{key}={value!r} is not known; allowed: {', '.join(allowed)}.{nearest(str(value), allowed)}")


def check_range(key: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Refuses a `value` of `key` outside the closed interval [`low`, `high`]; None leaves that side open.

    Raises:
        ConfigError: naming the key, the value and the interval; also if the value is not a finite number.
    """
    # In Python True is an integer.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key}={value!r} is not a number.")
    if not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not finite; give a number.")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{key}={value} is out of range; allowed: {_interval(low, high)}.")


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return f"{high} or less"
    return f"{low} or more" if high is None else f"{low} to {high}"


def check_integer(key: str, value: int, low: int | None = None, high: int | None = None) -> None:
    """Refuses a `value` of `key` that is not a whole number of at least `low` and at most `high`.

    Raises:
        ConfigError: as `check_range`; also for a fraction.
    """
    check_range(key, value, low, high)
    if not isinstance(value, int):
        raise ConfigError(f"{key}={value} is not a whole number.")


def check_flag(key: str, value: bool) -> None:
    """Refuses a `value` of `key` that is not a truth value: a word like `maybe` would count as true.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is neither true nor false; set {key}=true or {key}=false.")


def missing_extra(what: str, package: str, extra: str) -> ConfigError:
    """Returns the error for `what` that needs a `package` of one of this package's extras, which is not installed."""
    return ConfigError(f"{what} needs {package}, which is not installed; run: pip install 'pkm_lightning[{extra}]'.")
