"""What the callback refuses, and what a run of the command line leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from small import SMALL_RUN, Run

HERE = "callbacks.instability"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            f"{HERE}.policies.loss_spike=panic",
            "policies.loss_spike='panic' is not known; allowed: warn, skip, rollback",
        ),
        (f"+{HERE}.policies.loss_spyke=warn", "event='loss_spyke' is not known"),
        (
            f"{HERE}.policies.weight_not_finite=skip",
            "policies.weight_not_finite='skip' is not known; allowed: warn, roll",
        ),
        (f"{HERE}.window=0", f"{HERE}.window=0 is out of range"),
        (f"{HERE}.window=9 {HERE}.warm_up=5", f"{HERE}.window=9 is out of range; allowed: 10 to inf"),
        (f"{HERE}.settle_steps=201", f"{HERE}.settle_steps=201 is out of range; allowed: 0 to 200"),
        (f"{HERE}.warm_up=300", f"{HERE}.warm_up=300 is out of range; allowed: 1 to 200"),
        (f"{HERE}.max_tries=0", f"{HERE}.max_tries=0 is out of range"),
        (f"{HERE}.lr_factor=2.0", f"{HERE}.lr_factor=2.0 is out of range"),
        (f"{HERE}.restore=tape", f"{HERE}.restore='tape' is not known; allowed: memory, disk"),
        (f"+{HERE}.limits.score_max=much", f"{HERE}.limits.score_max='much' is no number"),
        (f"{HERE}.policies=7", f"{HERE}.policies=7 is no mapping"),
        (
            f"{HERE}.policies.loss_spike=rollback strategy=deepspeed_1 devices=2",
            f"{HERE}.restore=memory cannot copy what DeepSpeed's engine holds; say {HERE}.restore=disk",
        ),
        (
            f"{HERE}.policies.loss_spike=rollback {HERE}.restore=disk ~callbacks.step_checkpoint",
            "restore=disk needs callbacks.step_checkpoint",
        ),
        ("callbacks.diagnostics.rows=0", "callbacks.diagnostics.rows=0 is out of range"),
    ],
)
def test_refused_in_one_line_before_anything_starts(cli: Run, tmp_path: Path, overrides: str, message: str) -> None:
    outcome = cli("fit", *SMALL_RUN, "run_dir=run", *overrides.split())
    assert outcome.code == 2 or outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_quiet_run_has_no_events_and_its_diagnostics_beside_the_metrics(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    assert not (tmp_path / "run" / "events.jsonl").exists()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 6
    for name in ("attention_logit_max", "query_norm", "score_max", "value_norm", "update_ratio_table", "weight_top"):
        assert all(float(row[f"train/vitals/{name}"]) != 0 for row in rows), name


@pytest.mark.slow
def test_without_diagnostics_a_run_says_that_limits_are_not_watched(cli: Run, tmp_path: Path) -> None:
    outcome = cli("fit", *SMALL_RUN, "run_dir=run", "~callbacks.diagnostics", "trainer.max_steps=2")
    assert outcome.code == 0
    assert (
        "callbacks.instability.limits are not watched, since callbacks.diagnostics is off" in outcome.out + outcome.err
    )


def test_stop_ends_with_a_status_and_a_sentence(cli: Run, tmp_path: Path) -> None:
    limits = f"{HERE}.limits.output_logit_max=0.001"
    outcome = cli("fit", *SMALL_RUN, "run_dir=run", limits, f"{HERE}.policies.limit=stop")
    assert outcome.code not in (0, None)
    assert "limit of output_logit_max in step 2" in outcome.err
    assert "Traceback" not in outcome.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    (line,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event.keys() == {"step", "event", "layer", "figure", "value", "threshold", "action"}
    assert (event["step"], event["event"], event["figure"], event["threshold"]) == (
        2,
        "limit",
        "output_logit_max",
        0.001,
    )


def test_a_resumed_run_has_every_event_once(cli: Run, tmp_path: Path) -> None:
    limits = f"{HERE}.limits.output_logit_max=0.001"
    arguments = [*SMALL_RUN, "run_dir=run", limits, "+callbacks.stop._target_=toys.InterruptOnce"]
    assert cli("fit", *arguments[:-2], limits, "run_dir=whole").code == 0
    (tmp_path / "interrupt").touch()
    assert cli("fit", *arguments, "trust_config=true").code == 130
    assert cli("fit", *arguments, "trust_config=true").code == 0
    lines = [
        [json.loads(x) for x in (tmp_path / run / "events.jsonl").read_text().splitlines()] for run in ("whole", "run")
    ]
    assert [event["step"] for event in lines[1]] == [event["step"] for event in lines[0]] == [2, 4, 6, 8, 10, 12]
    assert lines[1] == lines[0]
