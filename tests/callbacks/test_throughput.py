"""Throughput is tokens over the time of training, and over nothing else; time is set by hand.

A micro-batch takes MICRO_BATCH seconds, a batch of validation and a checkpoint PAUSE.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import throughput_monitor
from lightning.pytorch.plugins import Precision
from toys import config

from pkm_lightning.callbacks import MetricsCSV, StepCheckpoint, Throughput, throughput
from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import LanguageModule

MICRO_BATCH, PAUSE = 0.25, 1000.0
ROWS, LENGTH, PADDING = 3, 8, 5  # of one micro-batch
REAL = ROWS * LENGTH - PADDING
Figures = list[dict[str, float]]


class Clock(L.Callback):
    """Lets time pass where a run spends it."""

    def __init__(self) -> None:
        self.now = 50.0

    def on_before_backward(self, *_: Any) -> None:
        self.now += MICRO_BATCH

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += PAUSE


class SlowFiles(AtomicCheckpointIO):
    """Writing a checkpoint takes time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        self.clock.now += PAUSE
        super().save_checkpoint(*arguments, **named)


class Latest(L.Callback):
    """Keeps the figures of each step that has any; None where there are none."""

    def __init__(self, watched: Throughput) -> None:
        self.watched, self.seen = watched, []  # type: Throughput, Figures

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(dict(self.watched.figures))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids_BT = torch.randint(50, (ROWS, LENGTH))
    valid_BT = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    valid_BT[-1, -PADDING:] = False
    return [{"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1), "valid": valid_BT} for _ in range(count)]


def loader(count: int) -> Any:
    return torch.utils.data.DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]


def module() -> LanguageModule:
    return LanguageModule(config("model.dim=16", "model.ffn_dim=12", "model.memory.n_keys=8", "trainer.max_steps=100"))


def fit(
    clock: Clock,
    steps: int,
    *,
    window: int = 1,
    callbacks: tuple[L.Callback, ...] = (),
    validate: bool = False,
    ckpt_path: str | None = None,
    **changes: Any,
) -> tuple[Figures, LanguageModule]:
    """Returns the figures after each micro-batch of a training, and the module."""
    watched = Throughput(window=window)
    latest = Latest(watched)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "max_steps": steps, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1,
        "enable_checkpointing": any(isinstance(c, StepCheckpoint) for c in callbacks),
        "plugins": [SlowFiles(clock)], "val_check_interval": 2, "check_val_every_n_epoch": None,
    }  # fmt: skip
    trainer = L.Trainer(**{**settings, **changes}, callbacks=[clock, watched, latest, *callbacks])
    trained = module()
    trainer.fit(trained, loader(100), [loader(1)] if validate else None, ckpt_path=ckpt_path)
    return latest.seen, trained


def test_figures_are_counts_over_training_time(clock: Clock) -> None:
    seen, trained = fit(clock, 4, validate=True)
    tokens = REAL / MICRO_BATCH
    for figures in seen:
        assert figures == pytest.approx(
            {
                "tokens_per_sec": tokens,
                "samples_per_sec": ROWS / MICRO_BATCH,
                "steps_per_sec": 1 / MICRO_BATCH,
                "flops_per_sec": tokens * trained.cost.train_flops,
                "row_bytes_per_sec": tokens * trained.cost.train_bytes,
            }
        )


@pytest.mark.parametrize("every", [2, 3])
def test_checkpoints_take_no_training_time(clock: Clock, tmp_path: Path, every: int) -> None:
    checkpoints = StepCheckpoint(dirpath=str(tmp_path), every_n_steps=every)
    seen, _ = fit(clock, 6, validate=True, callbacks=(checkpoints,))
    assert [f["tokens_per_sec"] for f in seen] == [pytest.approx(REAL / MICRO_BATCH)] * 6
    assert clock.now > 50 + PAUSE * 6 / every, "no checkpoint was slow"


def test_accumulated_micro_batches_make_one_step(clock: Clock) -> None:
    seen, _ = fit(clock, 4, accumulate_grad_batches=2, log_every_n_steps=2)
    assert seen[:3] == [{}] * 3
    assert seen[3]["steps_per_sec"] == pytest.approx(1 / (2 * MICRO_BATCH))
    assert seen[3]["samples_per_sec"] == pytest.approx(ROWS / MICRO_BATCH)
    assert seen[3]["tokens_per_sec"] == pytest.approx(REAL / MICRO_BATCH)
    assert len(seen) == 8


class SlowStep(L.Callback):
    """The second step takes four times as long."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.clock.now += 3 * MICRO_BATCH if trainer.global_step == 1 else 0


def test_the_window_is_the_mean_of_its_log_steps(clock: Clock) -> None:
    seen, _ = fit(clock, 4, window=2, callbacks=(SlowStep(clock),))
    assert [f.get("steps_per_sec") for f in seen] == [
        None, *(pytest.approx(2 / (micro_batches * MICRO_BATCH)) for micro_batches in (5, 5, 2)),
    ]  # fmt: skip


def test_a_resumed_run_counts_from_where_it_goes_on(clock: Clock, tmp_path: Path) -> None:
    fit(clock, 3, callbacks=(StepCheckpoint(dirpath=str(tmp_path), every_n_steps=3),))
    (path,) = tmp_path.iterdir()
    clock.now += PAUSE
    seen, trained = fit(clock, 5, ckpt_path=str(path))
    assert int(trained.tokens_seen) == 5 * REAL
    assert [f["tokens_per_sec"] for f in seen] == [pytest.approx(REAL / MICRO_BATCH)] * 2
    assert [f["steps_per_sec"] for f in seen] == [pytest.approx(1 / MICRO_BATCH)] * 2


def test_rows_of_metrics_csv_agree_with_their_own_tokens_and_seconds(clock: Clock, tmp_path: Path) -> None:
    fit(clock, 6, callbacks=(MetricsCSV(path=str(tmp_path / "metrics.csv")),), log_every_n_steps=3)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 2
    for before, row in zip([dict.fromkeys(rows[0], 0.0), *rows], rows, strict=False):
        gained = {key: row[key] - before[key] for key in ("tokens", "flops", "step", "seconds")}
        assert row["train/throughput/tokens_per_sec"] == pytest.approx(gained["tokens"] / gained["seconds"])
        assert row["train/throughput/flops_per_sec"] == pytest.approx(gained["flops"] / gained["seconds"])
        assert row["train/throughput/steps_per_sec"] == pytest.approx(gained["step"] / gained["seconds"])


def test_the_device_is_waited_for_at_log_steps_only(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, reads = torch.Tensor.__int__, []

    def read(tensor: torch.Tensor) -> int:
        if sys._getframe(1).f_globals["__name__"] == throughput.__name__:
            reads.append(tensor)
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "__int__", read)
    fit(clock, 8, log_every_n_steps=4)
    assert len(reads) == 1 + 2  # one before the first step


def test_shares_of_known_devices(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_monitor, "get_available_flops", lambda *_: 10**9)
    monkeypatch.setattr(throughput, "memory_bandwidth", lambda _: 10.0**8)
    seen, _ = fit(clock, 2)
    assert seen[-1]["mfu"] == pytest.approx(seen[-1]["flops_per_sec"] / 10**9)
    assert seen[-1]["mbu"] == pytest.approx(seen[-1]["row_bytes_per_sec"] / 10**8)


def test_figures_are_of_all_ranks_and_shares_of_all_devices(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_monitor, "get_available_flops", lambda *_: 10**6)
    monkeypatch.setattr(throughput, "memory_bandwidth", lambda _: 10.0**5)
    trainer: Any = SimpleNamespace(
        world_size=4, precision_plugin=Precision(), strategy=SimpleNamespace(root_device=torch.device("cpu")),
        enable_validation=False, state=SimpleNamespace(stage="train"), global_step=1, log_every_n_steps=1,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
    )  # fmt: skip
    trained = LanguageModule({"seed": 1})
    trained.cost = SimpleNamespace(train_flops=1000, train_bytes=10)  # type: ignore[assignment]
    logged: dict[str, float] = {}
    trained.log_dict = logged.update  # type: ignore[method-assign,assignment]
    trained.log_is_due = lambda: True  # type: ignore[method-assign]
    watched = Throughput(window=1)
    watched.setup(trainer, trained, "fit")
    watched.on_train_start(trainer, trained)
    trained.tokens_seen += 700
    clock.now += 2.0
    watched.on_train_batch_end(trainer, trained, None, batches(1)[0])
    assert logged == pytest.approx({
        "train/throughput/tokens_per_sec": 350.0,
        "train/throughput/samples_per_sec": 4 * ROWS / 2,
        "train/throughput/steps_per_sec": 0.5,
        "train/throughput/flops_per_sec": 350e3,
        "train/throughput/row_bytes_per_sec": 3500.0,
        "train/throughput/mfu": 350e3 / 4e6,
        "train/throughput/mbu": 3500 / 4e5,
    })  # fmt: skip


def test_bandwidth_is_looked_up_by_the_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert throughput.memory_bandwidth(torch.device("cuda", 0)) == 4.8e12
    name = "Tesla T4"
    assert throughput.memory_bandwidth(torch.device("cuda", 0)) is None
    assert throughput.memory_bandwidth(torch.device("cpu")) is None


def test_peaks_that_lightning_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    device = torch.device("cuda", 0)
    assert throughput.peak_flops(device, torch.bfloat16) == 989_400_000_000_000
    assert throughput.peak_flops(device, torch.float32) == 66_900_000_000_000
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert throughput.peak_flops(device, torch.float32) == 494_700_000_000_000
    assert throughput.peak_flops(device, torch.int8) is None
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2"])
def test_a_window_must_be_a_positive_integer(window: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.throughput\.window="):
        Throughput(window=window)
