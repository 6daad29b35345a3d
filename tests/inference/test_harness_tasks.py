"""Tasks from a folder of the user's: found from anywhere, and refused with the command that makes them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_tasks import NAMES, write_task, write_tasks
from toys import dense, transformer

from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.inference import harness_tasks
from pkm_lightning.inference.harness import HarnessModel
from pkm_lightning.inference.harness_results import Score, run_tasks, scores_of
from pkm_lightning.inference.harness_tasks import load_tasks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, and a harness that has no others: its own 10,000 files take seconds to read."""
    default = harness_tasks.TaskManager
    monkeypatch.setattr(
        harness_tasks,
        "TaskManager",
        lambda include_path=None, **_: default(include_path=include_path, include_defaults=False),
    )
    return write_tasks(tmp_path / "tasks", 6, longest=4, words=2)


def test_data_lie_beside_the_yaml_wherever_the_command_is_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_tasks(["options", "perp*"], tasks_dir=Path("../tasks"), num_fewshot=None)
    assert list(loaded["tasks"]) == ["options", "perplexity"]
    assert [len(task.eval_docs) for task in loaded["tasks"].values()] == [6, 6]


def test_a_group_brings_its_tasks(folder: Path) -> None:
    (folder / "both.yaml").write_text("group: both\ntask: [options, letters]\n")
    loaded = load_tasks(["both"], tasks_dir=folder, num_fewshot=None)
    assert (list(loaded["tasks"]), list(loaded["groups"])) == (["options", "letters"], ["both"])


def test_examples_are_as_many_as_asked_unless_the_task_forbids_them(folder: Path) -> None:
    write_task(folder, "bare", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", num_fewshot=0)

    def shots(asked: int | None) -> list[int]:
        loaded = load_tasks(["options", "bare"], tasks_dir=folder, num_fewshot=asked)
        return [task.get_config("num_fewshot") for task in loaded["tasks"].values()]

    assert (shots(None), shots(3)) == ([0, 0], [3, 0])


def test_figures_have_their_error_and_number_and_leave_the_random_states_alone(folder: Path) -> None:
    lm = HarnessModel(
        transformer([dense()], vocab_size=258).eval(),
        bytes_tokenizer(),
        context=256,
        device=torch.device("cpu"),
        batch_size=4,
        progress=False,
    )

    def figures() -> list[Score]:
        tasks = load_tasks(NAMES, tasks_dir=folder, num_fewshot=2)
        for name in set(NAMES) - {"options"}:
            tasks["tasks"][name].set_config(key="num_fewshot", value=0)
        return scores_of(run_tasks(lm, tasks, limit=5, bootstraps=0, progress=False))

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    scores = figures()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    torch.manual_seed(9)
    random.seed(9)
    assert figures() == scores
    named = {(score.task, score.metric): score for score in scores}
    assert set(named) == {
        ("options", "acc"), ("options", "acc_norm"), ("letters", "acc"), ("letters", "acc_norm"),
        ("answers", "exact_match"), ("perplexity", "byte_perplexity"),
    }  # fmt: skip
    assert {score.n for score in scores} == {5}
    accuracy = named["options", "acc"]
    assert accuracy.value * 5 == pytest.approx(round(accuracy.value * 5))
    assert named["perplexity", "byte_perplexity"].value > 1


@pytest.mark.parametrize(("task", "most"), [("options", 8), ("own", 5)])
def test_more_examples_than_there_are_are_refused(folder: Path, task: str, most: int) -> None:
    """The one task has 8 examples in a split of their own, the other takes them from its 6 questions."""
    keys = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "gold", "fewshot_split": "test"}
    write_task(folder, "own", "multiple_choice", **keys)
    load_tasks([task], tasks_dir=folder, num_fewshot=most)
    with pytest.raises(ConfigError, match=f"num_fewshot={most + 1}: {task} has at most {most} examples to show"):
        load_tasks([task], tasks_dir=folder, num_fewshot=most + 1)


def missing_file(folder: Path) -> None:
    (folder / "data" / "test.jsonl").unlink()


def broken_row(folder: Path) -> None:
    (folder / "data" / "test.jsonl").write_text('{"question": \n')


def foreign_code(folder: Path) -> None:
    write_task(folder, "unsafe", "generate_until", doc_to_text="a", doc_to_target="b", unsafe_code=True)


def broken_code(folder: Path) -> None:
    text = (folder / "options.yaml").read_text()
    (folder / "options.yaml").write_text(text + "process_docs: !function helper.change\n")
    (folder / "helper.py").write_text("1 / 0\n")


@pytest.mark.parametrize(
    ("damage", "task", "error", "said"),
    [
        (None, "optoins", ConfigError, "tasks: 'optoins' is no task of .*Did you mean 'options'"),
        (missing_file, "options", DataError, "options or its data cannot be read .*again with: prepare"),
        (broken_row, "options", DataError, "options or its data cannot be read .*again with: prepare"),
        (broken_code, "options", ConfigError, "options.yaml cannot be loaded .*division by zero"),
        (foreign_code, "unsafe", ConfigError, "unsafe runs code that the model writes"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_used_are_refused(
    folder: Path, damage: Any, task: str, error: type[Exception], said: str
) -> None:
    if damage is not None:
        damage(folder)
    with pytest.raises(error, match=said) as refused:
        load_tasks([task], tasks_dir=folder, num_fewshot=None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_tasks_names_the_command_that_makes_one(folder: Path, tmp_path: Path, made: bool) -> None:
    empty = tmp_path / "empty"
    if made:
        empty.mkdir()
    with pytest.raises(DataError, match="make a folder of tasks with: prepare data=benchmarks packages=DIR out=DIR"):
        load_tasks(["options"], tasks_dir=empty, num_fewshot=None)


def test_a_task_that_cannot_be_loaded_is_refused_alone(folder: Path) -> None:
    text = (folder / "options.yaml").read_text().replace("task: options", "task: other")
    (folder / "other.yaml").write_text(text + "process_docs: !function helper.missing\n")
    (folder / "helper.py").write_text("")
    for number, files in enumerate(("dataset_kwargs: [1]", "dataset_kwargs: {data_files: {test: 5}}")):
        (folder / f"{number}.yaml").write_text(f"task: wrong{number}\ndataset_path: json\n{files}\n")
    assert list(load_tasks(["options"], tasks_dir=folder, num_fewshot=None)["tasks"]) == ["options"]
    for name, said in (("other", "no function 'missing'"), ("wrong0", "is no mapping"), ("wrong1", "5, which is no")):
        with pytest.raises(ConfigError, match=said):
            load_tasks([name], tasks_dir=folder, num_fewshot=None)
