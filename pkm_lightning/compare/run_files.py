"""The files of one run: its configuration, the rows of its metrics, and its answers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pkm_lightning.storage import open_regular

#: In bytes; the configuration of a run has some kilobytes.
_LARGEST_YAML = 2**20


@dataclass(frozen=True)
class Answers:
    """The answers of a run's test to the questions of one form, in the order of their prompts.

    Args:
        prompts: the questions; the same for runs on the same facts.
        exact: whether each answer was right.
        bits: bits of knowledge about each answer, prior minus model; nan where the prior is unknown.
        deciles: decile of each subject's exposure; 0 holds the subjects that are shown most.
    """

    prompts: tuple[str, ...]
    exact: np.ndarray
    bits: np.ndarray
    deciles: np.ndarray


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.yaml; returns an empty dict where there is no readable one."""
    try:
        config = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def read_yaml(file: Path) -> Any:
    """Returns the content of a YAML file, in bounded time whatever it holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, larger than 1 MiB, nested too deeply, or a few lines that stand for millions.
    """
    with open_regular(file, "rb") as opened:
        raw = opened.read(_LARGEST_YAML + 1)
    if len(raw) > _LARGEST_YAML:
        raise ValueError(f"it is larger than {_LARGEST_YAML:,} bytes")
    try:
        loader = yaml.SafeLoader(raw.decode())
        node = loader.get_single_node()
        # Merge keys would be copied by the constructor, other aliases by whoever walks through the content.
        if _extent(node, {}) > 2 * _LARGEST_YAML:
            raise ValueError("its aliases stand for more text than a configuration has")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # constructors raise errors of many classes for a value that does not fit its tag
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _extent(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Returns the length of all texts under `node`, each counted as often as aliases repeat it."""
    if isinstance(node, yaml.ScalarNode) or node is None:
        return 1 if node is None else 1 + len(node.value)
    if id(node) not in known:
        known[id(node)] = 3 * _LARGEST_YAML  # holds within a cycle
        pairs = isinstance(node, yaml.MappingNode)
        children = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_extent(child, known) for child in children)
    return known[id(node)]


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Reads the rows of a metrics.csv that have `tokens` and `seconds`.

    A missing file has no rows; a line that is being written is left out.
    """
    try:
        with open_regular(file, newline="", encoding="utf-8") as opened:
            raw = list(csv.DictReader(opened))
    except OSError:
        return []
    rows = []
    for line in raw:
        try:
            row = {key: float(value) for key, value in line.items() if key and value not in ("", None)}
        except (TypeError, ValueError):
            continue
        if {"tokens", "seconds"} <= row.keys():
            rows.append(row)
    return rows


def read_answers(file: Path) -> dict[str, Answers]:
    """Reads the answers in a recall.csv by form; a missing file has none."""
    try:
        with open_regular(file, newline="", encoding="utf-8") as opened:
            lines = list(csv.DictReader(opened))
    except OSError:
        return {}
    lines_by_form: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        lines_by_form.setdefault(line["form"], []).append(line)
    answers = {}
    for form, of_form in lines_by_form.items():
        # Runs ask in different orders; the bootstrap pairs their answers by position.
        of_form.sort(key=lambda line: (line["relation"], line["prompt"], line["truth"]))
        answers[form] = Answers(
            prompts=tuple(f"{line['relation']}: {line['prompt']}" for line in of_form),
            exact=np.array([line["exact"] == "1" for line in of_form]),
            bits=np.array([float(line["prior_bits"]) - float(line["bits"]) for line in of_form]),
            deciles=np.array([int(line["decile"]) for line in of_form]),
        )
    return answers
