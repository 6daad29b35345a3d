"""`fit` leaves a complete run directory, and continues, refuses or replaces an earlier run as requested."""

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

from pkm_lightning.cli import fit
from pkm_lightning.cli.run_directory import RunDirectory
from pkm_lightning.errors import RunDirectoryError

RECORD_KEYS = {
    "schema", "status", "ffn", "seed", "params", "flops_per_token", "bytes_per_token", "tokens", "seconds",
    "tokens_per_second", "peak_memory_bytes", "device", "versions", "commit", "precision", "world_size", "threads",
    "data", "started", "ended", "metrics",
}  # fmt: skip


#: Generating answers takes most of the time of a run this small.
NO_ANSWERS = ["~callbacks.recall", "~callbacks.samples"]


def test_a_finished_run_is_complete_and_is_replaced_only_on_request(cli: Run, tmp_path: Path) -> None:
    panels = "callbacks.slot_usage.panels_every_n_steps=12"  # not at each validation, of which test_slot_outputs.py is
    shown = cli("fit", *[o for o in SMALL_RUN if o != "logger=none"], panels, "run_dir=run")
    assert shown.code == 0, shown.err
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    files = {".lock", "config.yaml", "metrics.csv", "recall.csv", "run.json", "tokenizer.json", "usage.json", "heldout"}
    assert names == {*files, "tensorboard", "checkpoints"}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocab_size"] == 600
    check_record(run)
    check_metrics(run)
    shown_at_the_end = ("recall, paraphrases", "perplexity", "tokens/s", "parameters total / active", "FLOPs", "bytes")
    for text in (*shown_at_the_end, "truth"):
        assert text in shown.out, shown.out

    refused = cli("fit", *SMALL_RUN, "run_dir=run")
    assert refused.code == 2
    assert "holds a run that finished" in refused.err
    assert "resume=never" in refused.err
    before = record(run)["started"]
    again = cli("fit", *SMALL_RUN, *NO_ANSWERS, "run_dir=run", "resume=never", "seed=5", "trainer.max_steps=4")
    assert again.code == 0, again.err
    assert record(run)["seed"] == 5
    assert record(run)["started"] >= before
    assert len([r for r in rows(run) if r["train/loss"]]) == 2


def check_record(run: Path) -> None:
    """run.json has every figure, and those of recall equal the answers in recall.csv."""
    content = record(run)
    assert content.keys() >= RECORD_KEYS
    assert content["status"] == "finished"
    assert content["ffn"] == "MemoryPlus"
    assert content["tokens"] == int(rows(run)[-1]["tokens"]) > 0
    assert content["params"]["total"] > content["params"]["active"] > 0
    assert content["flops_per_token"]["train"] == 3 * content["flops_per_token"]["decode"]
    assert 0 < content["peak_memory_bytes"] < 4e9
    assert 200 < content["facts"] <= 60 * 3 + 10 * 2 + 20  # not every subject has every relation
    recall = content["metrics"]["recall"]
    assert {"seen", "paraphrase", "question", "control"} <= recall.keys()
    assert {"by_relation", "by_decile", "recall", "choice", "bits"} <= recall["paraphrase"].keys()
    with (run / "recall.csv").open(newline="") as file:
        answers = [row for row in csv.DictReader(file) if row["form"] == "paraphrase"]
    assert len(answers) == recall["paraphrase"]["n"]
    assert statistics.fmean(int(row["exact"]) for row in answers) == pytest.approx(
        content["metrics"]["test/recall_paraphrase"]
    )
    gained = [float(row["prior_bits"]) - float(row["bits"]) for row in answers]
    assert statistics.fmean(gained) == pytest.approx(recall["paraphrase"]["bits"], rel=EXACT_FLOAT)


def check_metrics(run: Path) -> None:
    """metrics.csv has steps, tokens and FLOPs in order, validations where they are due, and a loss that goes down."""
    steps = [int(row["step"]) for row in rows(run)]
    assert steps == sorted(steps)
    assert set(steps) == {2, 4, 6, 8, 10, 12}
    assert [int(r["step"]) for r in rows(run) if r["val/loss"]] == [4, 8, 12]
    per_token = record(run)["flops_per_token"]["train"]
    for row in rows(run):
        assert int(row["flops"]) == int(row["tokens"]) * per_token
    losses = [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.3


def as_if_killed(run: Path) -> None:
    """Leaves `running` without the lock, as SIGKILL does."""
    content = record(run)
    content.update(status="running", ended=None)
    (run / "run.json").write_text(json.dumps(content))


def test_an_interrupted_run_takes_its_own_configuration_also_where_it_was_moved(
    cli: Run, trained: Path, tmp_path: Path
) -> None:
    as_if_killed(trained)
    refused = cli("fit", *SMALL_RUN, "run_dir=run", "model.tied=true", "ffn=dense")
    assert refused.code == 2
    assert "another configuration" in refused.err
    assert "(ffn: pkm_lightning.ffn.MemoryPlus -> pkm_lightning.ffn.Dense)" in refused.err
    trained.rename(tmp_path / "moved")
    resumed = cli("fit", "run_dir=moved")
    assert resumed.code == 0, resumed.err
    # The saved configuration differs from the default one in this key.
    assert yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())["model"]["tied"] is True
    assert record(tmp_path / "moved")["status"] == "finished"
    assert not trained.exists()


def test_a_run_of_an_earlier_version_is_continued_by_its_own_command(cli: Run, trained: Path) -> None:
    """The callback `diagnostics` was `vitals`; the command that started the run goes on with it."""
    as_if_killed(trained)
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    entry = saved["callbacks"].pop("diagnostics")
    saved["callbacks"]["vitals"] = {**entry, "_target_": "pkm_lightning.callbacks.Vitals"}
    (trained / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    continued = cli("fit", *SMALL_RUN, "run_dir=run", "model.tied=true")
    assert continued.code == 0, continued.err
    assert record(trained)["status"] == "finished"


def test_a_continued_run_keeps_the_time_of_earlier_sittings_from_its_start(
    cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_killed(trained)
    before, at_start = record(trained)["seconds"]["total"], []

    def stopped_at_once(*_: object) -> None:
        at_start.append(record(trained)["seconds"]["total"])
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "_train", stopped_at_once)
    assert cli("fit", "run_dir=run").code == 130
    assert at_start == [before]
    assert record(trained)["seconds"]["total"] >= before > 0


def test_a_directory_in_use_is_refused(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with held_elsewhere(tmp_path / "run"):
        shown = cli("fit", *SMALL_RUN, "run_dir=run")
    assert shown.code == 2
    assert "held by another process" in shown.err


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_named(cli: Run, trained: Path, damage: str) -> None:
    as_if_killed(trained)
    checkpoint = trained / "checkpoints" / "step-00000012.ckpt"
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
        "    calls = 0\n"
        "    def forward(self, x, context):\n"
        "        self.calls += 1\n"
        "        if self.calls > 8:\n"
        "            raise ArithmeticError('numbers went wrong')\n"
        "        return super().forward(x, context)\n"
    )
    with pytest.raises(ArithmeticError):
        cli("fit", *SMALL_RUN, "run_dir=run", "ffn=dense", "ffn._target_=breaking.Breaking")
    assert record(tmp_path / "run")["status"] == "failed"
    assert record(tmp_path / "run")["reason"] == "ArithmeticError: numbers went wrong"
    assert "holds a run that failed" in cli("fit", "run_dir=run", "trust_config=true").err


def test_the_default_run_directory_is_under_runs(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, *NO_ANSWERS, "trainer.max_steps=2", "ffn=dense").code == 0
    assert len(list((tmp_path / "runs").glob("*/*/run.json"))) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_a_directory_of_something_else_is_left_alone(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    shown = cli("fit", *SMALL_RUN, "run_dir=run", "resume=never")
    assert shown.code == 2
    assert "has no run.json" in shown.err
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("file", ["checkpoints", "notes.txt", "config.yaml"])
def test_foreign_files_are_refused_and_left_alone(tmp_path: Path, file: str, resume: str) -> None:
    (tmp_path / file).write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"has no run\.json"):
        RunDirectory(tmp_path, resume=resume)
    assert (tmp_path / file).read_text() == "mine"


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
