"""The questions about the data of a run, as JSON beside its held-out sequences: written by it, read from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pkm_lightning.data.base import RecallItem
from pkm_lightning.errors import DataError
from pkm_lightning.storage import open_regular, write_beside

_TEXTS, _COUNTS = ("prompt", "answer", "relation", "form"), ("exposures", "decile")


def write_questions(file: Path, items: Iterable[RecallItem]) -> None:
    """Writes `items`."""
    # Counts may be scalars of NumPy.
    made = json.dumps([asdict(item) for item in items], ensure_ascii=False, default=lambda value: value.item())
    write_beside(file, made)


def read_questions(file: Path) -> list[RecallItem]:
    """Returns the questions in `file`, each value of the kind that scoring them needs.

    Raises:
        DataError: the file is damaged.
    """
    entries = read_json(file)
    if not isinstance(entries, list) or not all(map(_is_question, entries)):
        raise damaged(file)
    return [RecallItem(**{**entry, "options": tuple(entry["options"])}) for entry in entries]


def read_json(file: Path) -> Any:
    """Returns the content of a file that a run has kept.

    Raises:
        DataError: it is damaged or missing.
    """
    try:
        with open_regular(file, encoding="utf-8") as opened:
            return json.load(opened)
    except (OSError, ValueError, RecursionError):
        raise damaged(file) from None


def damaged(file: Path) -> DataError:
    """Returns the error for a file that a run has kept and that cannot be read."""
    return DataError(
        f"{file} is damaged or missing; restore it from another copy of the run, or name the data: data.path=..."
    )


def _is_question(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(RecallItem)}:
        return False
    texts = [entry[name] for name in _TEXTS]
    if not isinstance(entry["options"], list) or not all(isinstance(text, str) for text in (*texts, *entry["options"])):
        return False
    is_number = isinstance(entry["prior_bits"], int | float) and isinstance(entry["majority"], bool)
    return is_number and all(isinstance(entry[name], int) for name in _COUNTS)
