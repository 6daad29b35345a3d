"""Settings of slot usage and revival that do not go together are refused before anything is written."""

from __future__ import annotations

import logging
from pathlib import Path

import distributed_jobs
import pytest
import usage_jobs as jobs

from pkm_lightning.build.run import make_callbacks, resolve
from pkm_lightning.callbacks.base import ChecksConfig
from pkm_lightning.errors import ConfigError

QUERIES = ["callbacks=[default,slot_revival]", "callbacks.slot_revival.source=queries"]
HALVES = "callbacks.slot_usage.per_head=halves"


def check(tmp_path: Path, *overrides: str) -> None:
    """Checks the configuration as every configured callback does."""
    config = distributed_jobs.config("ffn=memory_plus", f"run_dir={tmp_path / 'run'}", *overrides)
    for callback in make_callbacks(config):
        if isinstance(callback, ChecksConfig):
            callback.check(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["callbacks.slot_usage.every_n_steps=3", "trainer.log_every_n_steps=2"],
            "every_n_steps=3 is not a multiple of",
        ),
        ([*QUERIES], "needs callbacks.slot_usage.per_head=halves"),
        ([*QUERIES, HALVES, "model.compile=true"], "model.compile=true hides"),
        ([*QUERIES, HALVES, "strategy=deepspeed_2"], "DeepSpeed's engine owns"),
        (["callbacks=slot_revival"], "needs callbacks.slot_usage, which counts the reads"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, *overrides)


@pytest.mark.parametrize("per_head", ["halves", "full", "true"])
def test_what_goes_together_is_not(per_head: str, tmp_path: Path) -> None:
    check(tmp_path, *QUERIES, f"callbacks.slot_usage.per_head={per_head}", "strategy=single")


def test_a_run_is_assembled_only_if_its_callbacks_agree(tmp_path: Path) -> None:
    overrides = ["ffn=memory_plus", f"run_dir={tmp_path / 'run'}", "model.vocab_size=auto", "strategy=single", *QUERIES]
    config = distributed_jobs.config(*overrides, HALVES)
    names = [type(callback).__name__ for callback in resolve(config, training=True).callbacks]
    assert names[-2:] == ["MetricsCSV", "Instability"]
    config["callbacks"]["slot_usage"]["per_head"] = False
    with pytest.raises(ConfigError, match=r"needs callbacks.slot_usage.per_head=halves"):
        resolve(config, training=True)
    assert not (tmp_path / "run").exists()


def test_tables_with_too_many_slots_are_named_and_not_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watching = jobs.usage(tmp_path, max_slots=255)
    with caplog.at_level(logging.WARNING):
        jobs.fit(["strategy=single", "ffn=memory_plus", "placement=all"], 1, [watching])
    assert "layer0.slot, layer1.slot, layer2.slot have more slots than callbacks.slot_usage.max_slots" in caplog.text
    assert watching.counters is None
    assert not (tmp_path / "usage.json").exists()
