"""What is asked of lm-evaluation-harness, checked before anything is loaded. It does not import the harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkm_lightning.errors import ConfigError, check_integer, missing_extra


@dataclass(frozen=True)
class HarnessSettings:
    """The tasks, and how much of them.

    Attributes:
        tasks: names of tasks, groups or tags.
        tasks_dir: folder of the user's own tasks.
        limit: questions per task; None for all.
        num_fewshot: solved examples before each question; None for each task's own number.
        batch_size: largest number of sequences per forward.
    """

    tasks: tuple[str, ...]
    tasks_dir: Path | None
    limit: int | None
    num_fewshot: int | None
    batch_size: int


def read_settings(
    *,
    tasks: object,
    tasks_dir: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    prefix: str = "",
) -> HarnessSettings:
    """Returns the settings that keys of a configuration give; one name may stand for a list.

    Args:
        tasks, tasks_dir, limit, num_fewshot, batch_size: values of the keys; see `HarnessSettings`.
        prefix: of the keys in messages, such as `callbacks.evaluate.`.

    Raises:
        ConfigError: no task, a value of another kind or out of range, or lm_eval is not installed.
    """
    listed = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) and name for name in listed):
        raise ConfigError(f"{prefix}tasks={tasks!r} is not a list of names; give {prefix}tasks=[NAME,NAME,...].")
    if not listed:
        raise ConfigError(f"{prefix}tasks=[] names no task; give {prefix}tasks=[NAME,...], such as pkm_piqa.")
    if limit is not None:
        check_integer(f"{prefix}limit", limit, low=1)
    if num_fewshot is not None:
        check_integer(f"{prefix}num_fewshot", num_fewshot, low=0)
    check_integer(f"{prefix}batch_size", batch_size, low=1)
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra(f"{prefix or 'evaluate: '}tasks", "lm_eval", "eval")
    named: object = tasks_dir
    if named is not None and not isinstance(named, str):
        raise ConfigError(f"{prefix}tasks_dir={named} is not text; quote it: \"{prefix}tasks_dir='{named}'\".")
    folder = None if tasks_dir is None else Path(tasks_dir).expanduser()
    return HarnessSettings(tuple(listed), folder, limit, num_fewshot, batch_size)
