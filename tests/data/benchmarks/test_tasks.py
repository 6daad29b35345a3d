"""Prompts and metrics are those of the tasks of the same names in lm-evaluation-harness, which are read as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from pkm_lightning.data.benchmarks.sets import SETS
from pkm_lightning.data.benchmarks.subjects import CATEGORY
from pkm_lightning.data.benchmarks.tasks import group_yamls, task_yaml

CHOICES = ["alpha", "beta", "gamma", "delta", "epsilon"]
RECORD: dict[str, Any] = {"question": "why", "passage": "It is.", "choices": CHOICES, "answers": ["a"], "gold": 1}
#: File of the harness's task, and the record above with its names of fields.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "nq_open": ("nq_open/nq_open.yaml", {"question": "why"}),
    "triviaqa": ("triviaqa/default.yaml", {"question": "why"}),
    "webqs": ("webqs/webqs.yaml", {"question": "why"}),
    "mmlu": ("mmlu/default/_default_template_yaml", {"question": "why", "choices": CHOICES}),
    "openbookqa": ("openbookqa/openbookqa.yaml", {"question_stem": "why"}),
    "piqa": ("piqa/piqa.yaml", {"goal": "why"}),
    "commonsense_qa": ("commonsense_qa/default.yaml", {"question": "why", "choices": {"text": CHOICES}}),
    "social_iqa": ("siqa/siqa.yaml", {"context": "It is.", "question": "why"}),
    "boolq": ("super_glue/boolq/default.yaml", {"passage": "It is.", "question": "why"}),
}
#: Options of the harness's task, and its defaults.
SAME = {
    "output_type": None,
    "description": "",
    "target_delimiter": " ",
    "fewshot_delimiter": "\n\n",
    "generation_kwargs": None,
    "filter_list": None,
}


class Text(yaml.SafeLoader):
    """A loader that takes a reference to a function for its name."""


Text.add_constructor("!function", lambda loader, node: str(node.value))


def theirs(name: str) -> dict[str, Any]:
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "tasks" / THEIRS[name][0]
    content: dict[str, Any] = yaml.load(file.read_text(), Loader=Text)
    return content


def prompt(task: dict[str, Any], record: dict[str, Any]) -> str:
    text = task["doc_to_text"]
    return str(record[text]) if text in record else jinja2.Template(text, keep_trailing_newline=True).render(record)


@pytest.mark.parametrize("name", THEIRS)
def test_a_task_asks_and_scores_as_the_harness_does(name: str) -> None:
    ours, other = yaml.safe_load(task_yaml(name, {"test": "x.jsonl"}, {})), theirs(name)
    assert prompt(ours, RECORD) == prompt(other, THEIRS[name][1])
    if name == "webqs":  # answered by generation here
        return
    for option, default in SAME.items():
        assert ours.get(option, default) == other.get(option, default), option
    free = ("aggregation", "higher_is_better")  # the defaults of these metrics
    scores = [
        [{key: value for key, value in m.items() if key not in free} for m in t["metric_list"]] for t in (ours, other)
    ]
    assert scores[0] == scores[1]
    if ours.get("doc_to_choice", "choices") != "choices":
        assert ours["doc_to_choice"] == other["doc_to_choice"]


def test_every_set_has_a_task() -> None:
    assert set(THEIRS) == {one.name for one in SETS}


def test_subjects_are_grouped_and_described_as_in_the_harness() -> None:
    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "tasks" / "mmlu" / "default"
    for subject, category in CATEGORY.items():
        other = yaml.load((folder / f"mmlu_{subject}.yaml").read_text(), Loader=Text)
        ours = yaml.safe_load(task_yaml("mmlu", {"test": "x.jsonl"}, {}, subject))
        assert (ours["description"], ours["task_alias"]) == (other["description"], other["task_alias"])
        assert other["tag"] == f"mmlu_{category}_tasks"
    groups = {name: yaml.safe_load(text) for name, text in group_yamls("mmlu", list(CATEGORY)).items()}
    assert len(groups) == 5
    assert sorted(task for group in groups["pkm_mmlu"]["task"] for task in groups[group]["task"]) == sorted(
        f"pkm_mmlu_{subject}" for subject in CATEGORY
    )
    aggregated = theirs_of_group(folder)["aggregate_metric_list"]
    assert all(group["aggregate_metric_list"] == aggregated for group in groups.values())


def theirs_of_group(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load((folder / "_mmlu.yaml").read_text(), Loader=Text)
    return content
