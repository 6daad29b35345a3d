"""What the callback refuses, and what a run leaves behind that is stopped or resumed."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import faults
import lightning as L
import pytest
from small import SMALL_RUN, Run
from toys import config

from pkm_lightning.callbacks import Diagnostics
from pkm_lightning.errors import ConfigError

HERE = "callbacks.instability"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policies": {"loss_spike": "panic"}},
            "policies.loss_spike='panic' is not known; allowed: warn, skip, rollback, stop",
        ),
        ({"policies": {"loss_spyke": "warn"}}, "event='loss_spyke' is not known"),
        (
            {"policies": {"weight_not_finite": "skip"}},
            "policies.weight_not_finite='skip' is not known; allowed: warn, rollback, stop",
        ),
        ({"policies": 7}, f"{HERE}.policies=7 is not a mapping"),
        ({"window": 9, "warm_up": 5}, f"{HERE}.window=9 is out of range; allowed: 10 or more"),
        ({"warm_up": 21}, f"{HERE}.warm_up=21 is out of range; allowed: 1 to 20"),
        ({"threshold": -1.0}, f"{HERE}.threshold=-1.0 is out of range"),
        ({"settle_steps": 9}, f"{HERE}.settle_steps=9 is out of range; allowed: 0 to 8"),
        ({"keep_every_n_steps": 0}, f"{HERE}.keep_every_n_steps=0 is out of range"),
        ({"max_tries": 0}, f"{HERE}.max_tries=0 is out of range"),
        ({"lr_factor": 2.0}, f"{HERE}.lr_factor=2.0 is out of range"),
        ({"restore": "tape"}, f"{HERE}.restore='tape' is not known; allowed: memory, disk"),
        ({"limits": {"score_max": "much"}}, f"{HERE}.limits.score_max='much' is not a number"),
        ({"limits": 7}, f"{HERE}.limits=7 is not a mapping"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        faults.watching(tmp_path, **changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("event", "policy", "overrides", "message"),
    [
        (
            "loss_spike",
            "rollback",
            "strategy=deepspeed_1",
            f"{HERE}.restore=memory cannot copy parameters that DeepSpeed's engine holds; set {HERE}.restore=disk",
        ),
        (
            "limit",
            "rollback",
            "restore=disk ~callbacks.step_checkpoint",
            "restore=disk needs callbacks.step_checkpoint",
        ),
    ],
)
def test_policies_that_cannot_be_carried_out_are_refused(
    tmp_path: Path, event: str, policy: str, overrides: str, message: str
) -> None:
    restore = "disk" if "restore=disk" in overrides else "memory"
    composed = config(f"run_dir={tmp_path}", *(o for o in overrides.split() if o != "restore=disk"))
    with pytest.raises(ConfigError) as refused:
        faults.watching(tmp_path, policies={event: policy}, restore=restore).check(composed)
    assert message in str(refused.value)
    faults.watching(tmp_path, policies={event: "warn"}, restore=restore).check(composed)


def test_limits_that_nothing_measures_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Finds diagnostics by their class, also under a key and a name of earlier versions."""
    watch, composed = faults.watching(tmp_path, limits={"score_max": 9.0}), config(f"run_dir={tmp_path}")
    diagnostics = composed["callbacks"].pop("diagnostics")
    composed["callbacks"]["vitals"] = {**diagnostics, "_target_": "pkm_lightning.callbacks.Vitals"}
    with caplog.at_level(logging.WARNING):
        watch.check(composed)
        assert caplog.messages == []
        watch.check({**composed, "callbacks": {"vitals": None}})
    assert caplog.messages == [f"{HERE}.limits are not watched, since callbacks.diagnostics is off"]


@pytest.mark.slow
def test_a_quiet_run_has_no_events_and_its_diagnostics_beside_the_metrics(cli: Run, tmp_path: Path) -> None:
    assert cli("fit", *SMALL_RUN, "run_dir=run").code == 0
    assert not (tmp_path / "run" / "events.jsonl").exists()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 6
    for name in ("attention_logit_max", "query_norm", "score_max", "value_norm", "update_ratio_table", "weight_top"):
        assert all(float(row[f"train/vitals/{name}"]) != 0 for row in rows), name


def test_stop_ends_with_a_status_and_a_sentence(cli: Run, tmp_path: Path) -> None:
    wrong = cli("fit", *SMALL_RUN, "run_dir=run", f"{HERE}.window=0")
    assert wrong.code == 2
    assert f"{HERE}.window=0 is out of range" in wrong.err
    assert "Traceback" not in wrong.err
    assert not (tmp_path / "run").exists()
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


class Killed(L.Callback):
    """Fails in the 7th step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            raise ValueError("killed")


def test_a_resumed_run_has_every_event_once(tmp_path: Path) -> None:
    def run(name: str, *more: L.Callback, **options: Any) -> list[dict[str, Any]]:
        watch = faults.watching(tmp_path / name, limits={"output_logit_max": 0.001})
        over = (*faults.SMALL, "trainer.log_every_n_steps=2")
        callbacks = [Diagnostics(rows=1), watch, *more]
        faults.train(tmp_path / name, *callbacks, overrides=over, steps=12, save_every=4, **options)
        return faults.events(tmp_path / name)

    whole = run("whole")
    with pytest.raises(ValueError, match="killed"):
        run("run", Killed())
    assert [event["step"] for event in whole] == [2, 4, 6, 8, 10, 12]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004.ckpt"
    # The loader begins where the killed run stopped reading at its checkpoint.
    assert run("run", without=range(4), ckpt_path=str(checkpoint)) == whole
