"""`evaluate` on a run: where its scores go, and what it refuses before a model is loaded."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import write_tasks
from processes import finish, held_elsewhere, start
from small import SMALL_RUN, Run, record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.compare.records import read_runs
from pkm_lightning.errors import CheckpointError

TASKS = "tasks=[options,answers,perplexity]"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks", 12, longest=4, words=2)


def test_scores_go_to_a_file_the_record_tensorboard_and_the_screen(cli: Run, trained: Path, tasks: Path) -> None:
    (trained / "tensorboard").mkdir()
    shown = cli("evaluate", "run_dir=run", TASKS, "tasks_dir=tasks", "limit=8")
    assert shown.code == 0, shown.err
    content = json.loads((trained / "evaluation.json").read_text())
    accuracy = content["results"]["options"]["acc,none"]
    assert content["n-samples"]["options"] == {"original": 12, "effective": 8}
    assert content["config"]["limit"] == 8
    kept = record(trained)["evaluation"]
    assert kept["options"]["acc"] == accuracy
    assert (kept["options"]["step"], kept["options"]["n"], kept["answers"]["num_fewshot"]) == (12, 8, 0)
    board = EventAccumulator(str(trained / "tensorboard"))
    board.Reload()
    (event,) = board.Scalars("eval/options_acc")
    assert (event.step, event.value) == (12, pytest.approx(accuracy))
    (row,) = (line for line in shown.out.splitlines() if "acc_norm" in line)
    assert f"{content['results']['options']['acc_norm,none']:.4f}" in row
    assert shown.out.splitlines()[-1] == f"written to {trained / 'evaluation.json'}"

    # A second command adds to the record, and reports still read it.
    assert cli("evaluate", "run_dir=run", "tasks=letters", "tasks_dir=tasks", "out=other.json").code == 0
    assert set(record(trained)["evaluation"]) == {"options", "answers", "perplexity", "letters"}
    assert record(trained)["evaluation"]["letters"]["n"] == 12
    assert (trained.parent / "other.json").is_file()
    (run,), _ = read_runs([trained])
    assert run.ok, run.failure


def test_a_bare_checkpoint_leaves_the_run_alone(cli: Run, trained: Path, tasks: Path) -> None:
    before = record(trained)
    checkpoint = next((trained / "checkpoints").iterdir())
    shown = cli("evaluate", f"ckpt={checkpoint}", "tasks=[letters]", f"tasks_dir={tasks}", "limit=2")
    assert shown.code == 0, shown.err
    assert (trained.parent / "evaluation.json").is_file()
    assert record(trained) == before


def test_a_run_that_is_being_trained_keeps_its_record(cli: Run, trained: Path, tasks: Path) -> None:
    before = record(trained)
    with held_elsewhere(trained):
        shown = cli("evaluate", "run_dir=run", "tasks=[letters]", "tasks_dir=tasks", "limit=2")
    assert shown.code == 0, shown.err
    assert "the scores are not in run.json" in shown.out + shown.err
    assert record(trained) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run_dir=run"], "tasks=[] names no task; give tasks=[NAME,...]"),
        (["run_dir=run", TASKS, "limit=0"], "limit=0 is out of range; allowed: 1 or more"),
        (["run_dir=run", TASKS, "batch_size=none"], "batch_size='none' is not a number"),
        (["run_dir=run", TASKS, "tasks_dir=nowhere"], "nowhere is not a directory; make a folder of tasks with:"),
        (["run_dir=run", TASKS, "out=nowhere/results.json"], "the folder nowhere does not exist"),
        (["run_dir=run", TASKS, "tasks_dir=tasks", "data.seed=5"], "evaluate does not read data.seed; leave it out"),
        (["run_dir=nowhere", TASKS], "run_dir"),
        (["run_dir=run", TASKS, "tasks_dir=5"], "tasks_dir=5 is not text; quote it"),
        (["run_dir=run", "~tasks"], "~tasks: evaluate cannot do without tasks"),
        ([TASKS], "evaluate needs run_dir=RUN_DIRECTORY or ckpt=CHECKPOINT, or a pretrained model: model=hf"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(
    cli: Run, trained: Path, tasks: Path, arguments: list[str], said: str
) -> None:
    shown = cli("evaluate", *arguments)
    assert shown.code == 2
    assert said in shown.err
    assert shown.err.startswith("error: ")
    assert not (trained / "evaluation.json").exists()


def test_a_model_needs_its_tokenizer(cli: Run, trained: Path, tasks: Path) -> None:
    (trained / "tokenizer.json").unlink()
    shown = cli("evaluate", "run_dir=run", TASKS, "tasks_dir=tasks")
    assert shown.code == 2
    assert "has no tokenizer.json beside it" in shown.err
    assert "fit with resume=always writes it" in shown.err


def test_a_tokenizer_that_no_file_holds_is_not_promised() -> None:
    config = {"data": {"_target_": "mine.Words"}}
    of_module: Any = LoadedModel(Any, None, config, Path("run/a.ckpt"), torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"mine.Words has one of this kind; .* is used by predict") as caught:
        of_module.codec()
    assert "resume=always" not in str(caught.value)


def test_a_missing_extra_names_its_command(cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    shown = cli("evaluate", "run_dir=run", TASKS)
    assert shown.code == 2
    assert "needs lm_eval, which is not installed; run: pip install 'pkm_lightning[eval]'" in shown.err


@pytest.mark.slow
def test_two_ranks_with_a_split_table_log_what_one_rank_does(tmp_path: Path, tasks: Path) -> None:
    given = [*SMALL_RUN, "callbacks=[default,evaluate]", "~callbacks.recall", "~callbacks.samples",
             "callbacks.evaluate.tasks=[options,letters,answers]", f"callbacks.evaluate.tasks_dir={tasks}",
             "callbacks.evaluate.every_n_steps=4"]  # fmt: skip
    given = [one for one in given if not one.startswith(("callbacks.recall", "callbacks.samples"))]

    def figures(name: str, *more: str) -> list[dict[str, float]]:
        finish(start("fit", *given, f"run_dir={name}", *more, cwd=tmp_path))
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if key.startswith("eval/")}
                for row in csv.DictReader(file)
                if row["eval/options_acc"]
            ]

    one, two = figures("one"), figures("two", "strategy=ddp", "devices=2")
    assert len(one) > 2
    assert two == one
