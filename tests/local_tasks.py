"""A folder of tasks of lm-evaluation-harness: YAML files beside JSONL, of sentences over a few words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "one", "red", "dog", "saw", "it", "run", "far", "away"]
#: Harness names of the tasks below.
NAMES = ("options", "letters", "answers", "perplexity")
_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
    "loglikelihood_rolling": ("byte_perplexity",),
}


def sentence(dice: random.Random, low: int, high: int) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(dice.randint(low, high)))


def write_tasks(folder: Path, items: int, *, longest: int = 12, words: int = 4) -> Path:
    """Writes `NAMES` into `folder`, each with `items` questions of up to `longest` words; returns it.

    `options` has choices of several tokens and takes examples from a split of its own, `letters` has choices of one
    token, `answers` is generated, `perplexity` reads texts of up to four times `longest`.
    """
    dice = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": sentence(dice, 1, longest),
            "choices": [sentence(dice, 1, words) for _ in range(4)],
            "gold": dice.randrange(4),
            "text": sentence(dice, 1, 4 * longest),
        }
        for _ in range(items + 8)
    ]
    (folder / "data").mkdir(exist_ok=True)
    for split, part in (("test", rows[:items]), ("train", rows[items:])):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    question = "{{question}} is"
    write_task(
        folder,
        "options",
        "multiple_choice",
        doc_to_text=question,
        doc_to_choice="choices",
        doc_to_target="gold",
        fewshot_split="train",
    )
    letters = {"doc_to_choice": ["a", "b", "c", "d"], "doc_to_target": "gold"}
    write_task(folder, "letters", "multiple_choice", doc_to_text=question, **letters)
    stops = {"until": [".", "dog"], "max_gen_toks": 12}
    write_task(
        folder,
        "answers",
        "generate_until",
        doc_to_text=question,
        doc_to_target="{{' ' + question.split()[-1]}}",
        generation_kwargs=stops,
    )
    write_task(folder, "perplexity", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    return folder


def write_task(folder: Path, name: str, kind: str, **keys: Any) -> None:
    """Writes the YAML of one task, with data relative to it."""
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data/test.jsonl", "train": "data/train.jsonl"}},
        "test_split": "test",
        "output_type": kind,
        "metric_list": [{"metric": metric} for metric in _METRICS[kind]],
        **keys,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
