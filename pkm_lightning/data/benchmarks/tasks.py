"""Tasks for lm-evaluation-harness (0.4.13), as the YAML that it reads.

Prompts, stop strings and metrics are those of the harness's own tasks of these names, so that scores can be compared;
only the source of the data differs. WebQuestions is answered by generation as NQ-open is, where the harness's own task
asks whether an accepted answer is the likeliest continuation.

`data_files` are names of files beside the YAML, so that the folder may be moved: `evaluate` looks there, and the
harness's own command is run in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pkm_lightning.data.benchmarks.subjects import CATEGORY

#: What the names of tasks begin with, so that none is that of a task of the harness.
PREFIX = "pkm_"

_EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_NORMALISED = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_OPEN = {
    "output_type": "generate_until",
    "doc_to_target": "answers",
    "target_delimiter": " ",
    "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0},
    "filter_list": [
        {"name": "remove_whitespace", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ],
}
_ARTICLES = {
    "ignore_case": True,
    "ignore_punctuation": True,
    "regexes_to_ignore": [r"\b(?:The |the |An |A |The |a |an )"],
}
_CHOICE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}


def _lettered(n: int) -> dict[str, Any]:
    """Returns the prompt that lists the choices under letters, and is answered by a letter."""
    letters = "ABCDE"[:n]
    listed = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(letters))
    return {**_CHOICE, "doc_to_text": f"{{{{question}}}}{listed}\nAnswer:", "doc_to_choice": list(letters)}


_TASKS: dict[str, dict[str, Any]] = {
    "nq_open": {
        **_OPEN,
        "description": "Answer these questions:\n\n",
        "doc_to_text": "Q: {{question}}?\nA:",
        "fewshot_delimiter": "\n",
        "metric_list": [{**_EXACT, **_ARTICLES}],
    },
    "triviaqa": {
        **_OPEN,
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "metric_list": [{**_EXACT, "ignore_case": True, "ignore_punctuation": True}],
    },
    "webqs": {**_OPEN, "doc_to_text": "Question: {{question}}\nAnswer:", "metric_list": [{**_EXACT, **_ARTICLES}]},
    "mmlu": {**_lettered(4), "metric_list": [_ACCURACY]},
    "openbookqa": {**_CHOICE, "doc_to_text": "question", "metric_list": [_ACCURACY, _NORMALISED]},
    "piqa": {
        **_CHOICE,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metric_list": [_ACCURACY, _NORMALISED],
    },
    "commonsense_qa": {
        **_lettered(5),
        "doc_to_text": "Question: " + _lettered(5)["doc_to_text"],
        "metric_list": [_ACCURACY],
    },
    "social_iqa": {**_CHOICE, "doc_to_text": "Q: {{passage}} {{question}}\nA:", "metric_list": [_ACCURACY]},
    "boolq": {**_CHOICE, "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:", "metric_list": [_ACCURACY]},
}


def task_yaml(name: str, files: Mapping[str, str], metadata: Mapping[str, str], subject: str | None = None) -> str:
    """Returns the YAML of a task.

    Args:
        name: of the set.
        files: name of the JSONL file of each split.
        metadata: what the task states about its source.
        subject: of MMLU, which has one task per subject.
    """
    described = {}
    if subject is not None:
        words = subject.replace("_", " ")
        described = {
            "task_alias": subject,
            "description": f"The following are multiple choice questions (with answers) about {words}.\n\n",
        }
    splits = {f"{split}_split": split for split in files}
    return _dump(
        {
            "task": PREFIX + (name if subject is None else f"{name}_{subject}"),
            **described,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": dict(files)},
            **splits,
            **_TASKS[name],
            "metadata": {"version": 1.0, **metadata},
        }
    )


def group_yamls(name: str, subjects: Sequence[str]) -> dict[str, str]:
    """Returns the YAML of each group by its name: one per category of `subjects`, and one of all categories."""
    by_category: dict[str, list[str]] = {}
    for subject in subjects:
        by_category.setdefault(CATEGORY[subject], []).append(f"{PREFIX}{name}_{subject}")
    groups = {f"{PREFIX}{name}_{category}": tasks for category, tasks in sorted(by_category.items())}
    mean = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}], "metadata": {"version": 1.0}}
    content = {group: {"group": group, "task": tasks, **mean} for group, tasks in groups.items()}
    content[PREFIX + name] = {"group": PREFIX + name, "task": list(groups), **mean}
    return {group: _dump(described) for group, described in content.items()}


class _Dumper(yaml.SafeDumper):
    """A dumper without anchors, which a reader would have to look up."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
