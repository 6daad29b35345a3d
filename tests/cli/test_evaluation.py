"""`validate`, `test` and `predict` on a run directory or a bare checkpoint; the saved configuration wins."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from small import Run


def test_test_repeats_the_figures_of_the_run(cli: Run, trained: Path) -> None:
    shown = cli("test", "run_dir=run")
    assert shown.code == 0, shown.err
    recorded = json.loads((trained / "run.json").read_text())["metrics"]
    again = json.loads((trained / "test.json").read_text())
    assert again == {name: recorded[name] for name in again}


def test_a_run_whose_data_an_earlier_version_prepared_is_evaluated_and_not_continued(cli: Run, trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    del config["data"]["cities"]
    (trained / "config.yaml").write_text(yaml.safe_dump(config))
    refused = cli("fit", "run_dir=run", "resume=always", "trainer.max_steps=16")
    assert refused.code == 2
    assert "earlier version, whose data had no data.cities and another order: it can be evaluated" in refused.err
    assert f"start a new run from its weights with init_from={trained}" in refused.err
    assert cli("test", "run_dir=run").code == 0
    other = cli("test", "run_dir=run", "data.people=30")
    assert other.code == 2
    assert "data.cities is not set: the run was started by an earlier version" in other.err


def test_validate_takes_a_bare_checkpoint(cli: Run, trained: Path) -> None:
    shown = cli("validate", f"ckpt={next((trained / 'checkpoints').iterdir())}")
    assert shown.code == 0, shown.err
    assert "val/loss" in shown.out


def test_predict_answers_in_order_from_the_command_line_and_from_a_file(cli: Run, trained: Path) -> None:
    shown = cli("predict", "run_dir=run", 'data.prompts=["The capital of France is","Who"]', "out=answers.jsonl")
    assert shown.code == 0, shown.err
    answers = [json.loads(line) for line in (trained.parent / "answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["The capital of France is", "Who"]
    assert [a["index"] for a in answers] == [0, 1]
    (trained.parent / "prompts.txt").write_text("One prompt\nAnother prompt, with a comma\n")
    assert cli("predict", "run_dir=run", "data.prompts_file=prompts.txt").code == 0
    answers = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["One prompt", "Another prompt, with a comma"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs run_dir=RUN_DIRECTORY or ckpt=CHECKPOINT, or a pretrained model"),
        (["run_dir=nowhere", "ckpt=nowhere.ckpt"], "may be of two runs; give run_dir"),
        (["run_dir=elsewhere"], "is not a directory"),
        (["ckpt=elsewhere.ckpt"], "does not exist"),
        (["run_dir=run", "ffn=dense"], "the saved configuration of a run wins"),
        (["run_dir=run", "model.dim=128"], "the saved configuration of a run wins"),
        (["run_dir=run", "data.eval_facts=0"], "data.eval_facts=0"),
    ],
)
def test_what_cannot_be_evaluated_is_said(cli: Run, trained: Path, arguments: list[str], said: str) -> None:
    shown = cli("test", *arguments)
    assert shown.code == 2
    assert said in shown.err


@pytest.mark.parametrize("verb", ["test", "validate", "predict", "export"])
def test_other_ranks_are_not_given_a_run_that_nobody_named(cli: Run, tmp_path: Path, verb: str) -> None:
    """Lightning starts them by `sys.argv`; the default run directory is one of a new run."""
    cli(verb, "ckpt=elsewhere.ckpt", "strategy=ddp", "devices=2")
    assert not [argument for argument in sys.argv if argument.startswith("run_dir")]
    assert {"ckpt=elsewhere.ckpt", "strategy=ddp", "devices=2"} <= set(sys.argv)
    cli(verb, "run_dir=elsewhere")
    assert f"run_dir='{tmp_path / 'elsewhere'}'" in sys.argv


def test_predict_without_prompts_names_the_keys(cli: Run, trained: Path) -> None:
    shown = cli("predict", "run_dir=run")
    assert shown.code == 2
    assert "data.prompts" in shown.err


def test_a_run_without_a_checkpoint_says_so(cli: Run, trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints")
    assert "has no checkpoint yet" in cli("test", "run_dir=run").err


@pytest.mark.parametrize(
    "planted",
    [
        "data: \"${oc.decode:'{_target_: os.system}'}\"",
        "callbacks: {x: {_target_: pkm_lightning.cli.run_directory.RunDirectory, path: elsewhere, resume: never}}",
        "callbacks: {x: {_target_: subprocess.Popen, args: [touch, planted]}}",
    ],
)
def test_a_planted_configuration_is_refused(cli: Run, trained: Path, planted: str) -> None:
    config = (trained / "config.yaml").read_text()
    key = planted.split(":")[0]
    kept = re.sub(rf"(?m)^{key}:\n(?:[ -].*\n)*", "", config)
    assert kept != config
    (trained / "config.yaml").write_text(kept + planted + "\n")
    for command in (["test", "run_dir=run"], ["fit", "run_dir=run", "resume=always", "table.shard=dim", "devices=1"]):
        shown = cli(*command)
        assert shown.code == 2, shown.out
        assert "config.yaml" in shown.err
        assert "Traceback" not in shown.err
