"""Tasks of lm-evaluation-harness, found by name and loaded with their data.

They come from a folder of the user's (YAML beside JSONL) and from the harness itself, whose data come from a hub.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from pkm_lightning.errors import ConfigError, DataError, PkmError, nearest

#: Makes a folder of tasks that needs no network.
PREPARE = "prepare data=benchmarks packages=DIR out=DIR"


@contextlib.contextmanager
def fixed_seeds() -> Iterator[None]:
    """Seeds everything as the harness's own command does, and puts the random states back afterwards."""
    with isolate_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        yield


def load_tasks(names: Sequence[str], *, tasks_dir: Path | None, num_fewshot: int | None) -> dict[str, Any]:
    """Returns tasks with their data, as the harness's `evaluate` takes them.

    Args:
        names: of tasks, groups or tags; `mmlu_*` stands for all that match.
        tasks_dir: a folder with YAML files of tasks; paths of data in them are relative to the YAML. Its names come
            before those of the harness.
        num_fewshot: solved examples before each question; None for each task's own number. A task of 0 keeps it.

    Raises:
        ConfigError: a name that is not known, or a task that needs more than texts.
        DataError: data that are missing or cannot be had.
    """
    manager, broken = _manager(names, tasks_dir)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with fixed_seeds():
        for match in dict.fromkeys(match for name in names for match in _matches(name, manager, tasks_dir)):
            if match in broken:
                raise broken[match]
            for kind, entries in _load(match, manager).items():
                loaded[kind].update(entries)
    for name, task in loaded["tasks"].items():
        for need, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows images")):
            if getattr(task, need, False):
                raise ConfigError(f"tasks: {name} {what}, which is not offered; leave it out.")
        _set_examples(name, task, num_fewshot)
    return loaded


def _manager(names: Sequence[str], tasks_dir: Path | None) -> tuple[TaskManager, dict[str, ConfigError]]:
    """Returns the index of the tasks of `tasks_dir`, and of the harness if a name is not among them.

    The second value has what is wrong with tasks that cannot be loaded, which matters if one of them is asked for.
    """
    if tasks_dir is None:
        return TaskManager(), {}
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    if not manager.all_tasks:
        what = "holds no YAML file of a task" if tasks_dir.is_dir() else "is not a directory"
        raise DataError(f"tasks_dir={tasks_dir} {what}; make a folder of tasks with: {PREPARE}.")
    if not all(manager.match_tasks([name]) for name in names):
        # It reads 10,000 files, which takes seconds.
        manager = TaskManager(include_path=str(tasks_dir))
    broken = {}
    for name, entry in manager.task_index.items():
        if entry.yaml_path is not None and entry.yaml_path.is_relative_to(tasks_dir) and entry.kind == Kind.TASK:
            try:
                manager.task_index[name] = _with_its_data(entry)
            except ConfigError as error:
                broken[name] = error
    return manager, broken


def _matches(name: str, manager: TaskManager, tasks_dir: Path | None) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if found:
        return found
    where = "; those of a folder need its tasks_dir" if tasks_dir is None else f" or in tasks_dir={tasks_dir}"
    raise ConfigError(f"tasks: {name!r} is no task of lm-evaluation-harness{where}.{nearest(name, manager.all_tasks)}")


def _with_its_data(entry: Entry) -> Entry:
    """Returns the entry of a YAML with its data files as absolute paths: the harness takes the working directory's.

    Raises:
        ConfigError: the YAML refers to a Python file that cannot be imported.
    """
    assert entry.yaml_path is not None
    kwargs = (entry.cfg or {}).get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ConfigError(f"{entry.yaml_path}: dataset_kwargs={kwargs} is no mapping of names to values; mend it.")
    files = kwargs.get("data_files")
    if files is None:
        return entry
    try:
        # Again, with the functions that it names: an entry without a path is taken as it is.
        config = load_yaml(entry.yaml_path)
    except Exception as error:  # whatever its Python file raises
        raise ConfigError(f"{entry.yaml_path} cannot be loaded ({_short(error)}); mend it.") from None
    kwargs = {**config["dataset_kwargs"], "data_files": _absolute(files, entry.yaml_path.parent)}
    return Entry(entry.name, entry.kind, None, {**config, "dataset_kwargs": kwargs}, entry.tags)


def _absolute(files: Any, folder: Path) -> Any:
    """Returns one path, a list or a mapping by split, with paths below `folder`; addresses stay."""
    if isinstance(files, dict):
        return {split: _absolute(of_split, folder) for split, of_split in files.items()}
    if isinstance(files, list):
        return [_absolute(file, folder) for file in files]
    if not isinstance(files, str):
        raise ConfigError(f"{folder}: data_files has {files}, which is no path; mend the YAML that names it.")
    return files if "://" in files else str(folder / files)


def _load(name: str, manager: TaskManager) -> dict[str, Any]:
    """Returns the tasks and groups that `name` stands for."""
    try:
        loaded: dict[str, Any] = manager.load([name])
        return loaded
    except PkmError:
        raise
    except Exception as error:  # libraries of data raise of every kind, offline as well
        reason = _short(error)
        entry = manager.task_index[name]
        if entry.yaml_path is None and entry.kind == Kind.TASK:
            raise DataError(
                f"tasks: {name} or its data cannot be read ({reason}); mend them, or make them again with: {PREPARE}."
            ) from error
        raise DataError(
            f"tasks: the data of {name} cannot be had ({reason}); a task of the harness needs the network once, tasks "
            f"without it are made by: {PREPARE}, and found with tasks_dir=DIR."
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Sets the solved examples of a task by the harness's rule, and the seed by which they are drawn."""
    stated = task.get_config("num_fewshot")
    if stated is None or (num_fewshot is not None and stated != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return
    split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
    # A question among the examples is left out of its own.
    needed = wanted + (split is not None and split == task.get_config("test_split"))
    n = len(list(islice(task.fewshot_docs() or (), needed)))
    if n < needed:
        most = max(0, n - needed + wanted)
        raise ConfigError(
            f"num_fewshot={wanted}: {name} has at most {most} examples to show before a question; lower num_fewshot."
        )
