"""`fit` leaves a run directory that says what happened, and takes up, refuses or replaces an earlier run as asked."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from processes import held_elsewhere
from small import SMALL_RUN, Run, record, rows
from tolerances import EXACT_FLOAT

RECORD_KEYS = {
    "schema", "status", "ffn", "seed", "params", "flops_per_token", "bytes_per_token", "tokens", "seconds",
    "tokens_per_second", "peak_memory_bytes", "device", "versions", "commit", "precision", "world_size", "threads",
    "data", "started", "ended", "metrics",
}  # fmt: skip


def test_a_run_directory_holds_the_whole_story(cli: Run, tmp_path: Path) -> None:
    shown = cli("fit", *[o for o in SMALL_RUN if o != "logger=none"], "run_dir=run")
    assert shown.code == 0, shown.err
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    files = {".lock", "config.yaml", "metrics.csv", "recall.csv", "run.json", "usage.json"}
    assert names == {*files, "tensorboard", "checkpoints"}
    said = record(run)
    assert said.keys() >= RECORD_KEYS
    assert said["status"] == "finished"
    assert said["ffn"] == "MemoryPlus"
    assert said["tokens"] == int(rows(run)[-1]["tokens"]) > 0
    assert said["params"]["total"] > said["params"]["active"] > 0
    assert said["flops_per_token"]["train"] == 3 * said["flops_per_token"]["decode"]
    assert 0 < said["peak_memory_bytes"] < 4e9
    assert {"seen", "paraphrase", "question", "control"} <= said["metrics"]["recall"].keys()
    with (run / "recall.csv").open(newline="") as file:
        answers = [row for row in csv.DictReader(file) if row["form"] == "paraphrase"]
    assert len(answers) == said["metrics"]["recall"]["paraphrase"]["n"]
    assert statistics.fmean(int(row["exact"]) for row in answers) == said["metrics"]["test/recall_paraphrase"]
    gained = [float(row["prior_bits"]) - float(row["bits"]) for row in answers]
    assert statistics.fmean(gained) == pytest.approx(said["metrics"]["recall"]["paraphrase"]["bits"], rel=EXACT_FLOAT)
    assert 200 < said["facts"] <= 60 * 3 + 10 * 2 + 20  # not every subject has every relation
    assert {"by_relation", "by_decile", "recall", "choice", "bits"} <= said["metrics"]["recall"]["paraphrase"].keys()
    for text in (
        "recall, paraphrases",
        "perplexity",
        "tokens/s",
        "parameters total / active",
        "FLOPs",
        "bytes",
        "truth",
    ):
        assert text in shown.out, shown.out


def test_metrics_csv_has_steps_tokens_seconds_and_flops(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    run = tmp_path / "run"
    steps = [int(row["step"]) for row in rows(run)]
    assert steps == sorted(steps)
    assert set(steps) == {2, 4, 6, 8, 10, 12}
    assert [int(r["step"]) for r in rows(run) if r["val/loss"]] == [4, 8, 12]
    per_token = record(run)["flops_per_token"]["train"]
    for row in rows(run):
        assert int(row["flops"]) == int(row["tokens"]) * per_token
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == 600


def test_the_loss_goes_down(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run") if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.3


def test_a_finished_run_is_refused_unless_told_otherwise(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    refused = cli("fit", *SMALL_RUN, "run_dir=run")
    assert refused.code == 2
    assert "holds a run that finished" in refused.err
    assert "resume=never" in refused.err
    before = record(tmp_path / "run")["started"]
    again = cli("fit", *SMALL_RUN, "run_dir=run", "resume=never", "seed=5")
    assert again.code == 0, again.err
    assert record(tmp_path / "run")["seed"] == 5
    assert record(tmp_path / "run")["started"] >= before
    assert len([r for r in rows(tmp_path / "run") if r["train/loss"]]) == 6


def as_if_killed(run: Path) -> None:
    """`running` without the lock is what SIGKILL leaves behind."""
    content = record(run)
    content.update(status="running", ended=None)
    (run / "run.json").write_text(json.dumps(content))


def test_an_interrupted_run_takes_its_own_configuration_also_where_it_was_moved(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run", "ffn=dense", "seed=3").code == 0
    as_if_killed(tmp_path / "run")
    refused = cli("fit", *SMALL_RUN, "run_dir=run", "ffn=memory_plus", "seed=3")
    assert refused.code == 2
    assert "another configuration" in refused.err
    assert "ffn._target_: pkm_lightning.ffn.Dense -> pkm_lightning.ffn.MemoryPlus" in refused.err
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = cli("fit", "run_dir=moved")
    assert resumed.code == 0, resumed.err
    assert record(tmp_path / "moved")["ffn"] == "Dense"
    assert record(tmp_path / "moved")["status"] == "finished"
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with held_elsewhere(tmp_path / "run"):
        shown = cli("fit", *SMALL_RUN, "run_dir=run")
    assert shown.code == 2
    assert "held by another process" in shown.err


@pytest.mark.parametrize("damage", ["truncated", pytest.param("foreign", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named(cli: Run, tmp_path: Path, damage: str) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    as_if_killed(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000012.ckpt"
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:10_000])
    else:
        torch.save({"weights": torch.zeros(2)}, checkpoint)
    for verb in ("fit", "test"):
        shown = cli(verb, "run_dir=run")
        assert shown.code == 2
        assert str(checkpoint) in shown.err
        assert "Traceback" not in shown.err


def test_a_failure_is_recorded_with_its_reason(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "breaking.py").write_text(
        "from pkm_lightning.ffn import Dense\n"
        "class Breaking(Dense):\n"
        "    def forward(self, x, context):\n"
        "        raise ArithmeticError('numbers went wrong')\n"
    )
    with pytest.raises(ArithmeticError):
        cli("fit", *SMALL_RUN, "run_dir=run", "ffn=dense", "ffn._target_=breaking.Breaking")
    assert record(tmp_path / "run")["status"] == "failed"
    assert record(tmp_path / "run")["reason"] == "ArithmeticError: numbers went wrong"
    assert "holds a run that failed" in cli("fit", "run_dir=run", "trust_config=true").err


def test_a_sweep_gives_each_job_a_directory(cli: Run, tmp_path: Path) -> None:
    shown = cli("fit", "-m", *SMALL_RUN, "ffn=dense,memory_plus", "trainer.max_steps=4", "run_dir=sweep")
    assert shown.code == 0, shown.err
    assert record(tmp_path / "sweep" / "0")["ffn"] == "Dense"
    assert record(tmp_path / "sweep" / "1")["ffn"] == "MemoryPlus"


def test_the_default_run_directory_is_under_runs(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "trainer.max_steps=2", "ffn=dense").code == 0
    assert len(list((tmp_path / "runs").glob("*/*/run.json"))) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("left", ["checkpoints", "notes.txt", "config.yaml"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_directory_of_something_else_is_left_alone(cli: Run, tmp_path: Path, left: str, resume: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("mine")
    shown = cli("fit", *SMALL_RUN, "run_dir=run", f"resume={resume}")
    assert shown.code == 2
    assert "has no run.json" in shown.err
    assert (tmp_path / "run" / left).read_text() == "mine"


def test_a_diverged_run_is_valid_json_and_says_so(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "diverging.py").write_text(
        "from pkm_lightning.ffn import Dense\n"
        "class Diverging(Dense):\n"
        "    def forward(self, x, context):\n"
        "        return super().forward(x * float('nan'), context)\n"
    )
    shown = cli(
        "fit", *SMALL_RUN, "run_dir=run", "ffn=dense", "ffn._target_=diverging.Diverging", "trainer.max_steps=2"
    )
    assert shown.code == 0, shown.err
    assert "not finite" in shown.out + shown.err
    assert "NaN" not in (tmp_path / "run" / "run.json").read_text()
    assert record(tmp_path / "run")["metrics"]["test/loss"] is None
