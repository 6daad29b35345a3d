"""When slot usage draws its panels, and which files remain after a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_jobs
import lightning as L
import pytest
import torch
import torch.distributed as dist
import usage_jobs as jobs
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Letters, config
from training.fits import loader
from usage.test_counters import Tracer, counters

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.callbacks import RunInterrupted, usage_report
from pkm_lightning.callbacks.slot_panels import draw_on
from pkm_lightning.ffn import Slots

ALONE = "strategy=single"


def test_an_interrupted_run_leaves_its_usage(tmp_path: Path) -> None:
    class Stop(jobs.Raw):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RunInterrupted("asked to stop")

    watching = jobs.usage(tmp_path)
    with pytest.raises(RunInterrupted):
        jobs.fit([ALONE, "ffn=moe", "placement=middle"], 3, [watching, Stop()])
    assert json.loads((tmp_path / "usage.json").read_text())["step"] == 1


class Stop(L.Callback):
    """Fails in one of Lightning's hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise ValueError("a fault")


@pytest.mark.parametrize(("hook", "written"), [("on_train_start", False), ("on_train_batch_end", True)])
def test_a_run_that_has_read_nothing_leaves_nothing(hook: str, written: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fault"):
        jobs.fit([ALONE, "ffn=pkm"], 2, [jobs.usage(tmp_path), Stop(hook)])
    assert (tmp_path / "usage.json").exists() is written


def test_a_fault_of_one_rank_asks_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = jobs.usage(tmp_path)
    module, _, _ = jobs.fit([ALONE, "ffn=pkm"], 1, [watching])
    (tmp_path / "usage.json").unlink()
    watching._traces = {1: {}}
    trainer: Any = SimpleNamespace(world_size=2, global_step=1, is_global_zero=True)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda: 2)
        patch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("waits for other ranks"))
        watching.on_exception(trainer, module, ValueError("a fault"))
    assert not (tmp_path / "usage.json").exists()


def test_panels_are_drawn_at_validations(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="board")
    overrides = [ALONE, "ffn=pkm", "trainer.limit_val_batches=1", "trainer.val_check_interval=2"]
    held_out = loader(jobs.batches(1))
    jobs.fit(overrides, 5, [jobs.usage(tmp_path)], loggers=[logger], val_dataloaders=held_out)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Images("usage/layer1.slot/heat_map")] == [2, 4]


def test_panels_reach_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="board")
    watching = jobs.usage(tmp_path, panels_every_n_steps=2)
    jobs.fit([ALONE, "ffn=memory_plus", "placement=all"], 4, [watching], loggers=[logger])
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("layer0.slot", "table0"):
        assert [event.step for event in events.Images(f"usage/{name}/heat_map")] == [2, 4]
        assert events.Images(f"usage/{name}/heat_map")[0].width == 660
        assert events.Images(f"usage/{name}/rank_frequency")[0].width == 600
    text = events.Tensors("usage/layer0.slot/most_read/text_summary")[-1].tensor_proto.string_val[0].decode()
    slot = int(watching.counters.total("layer0.slot", "window").counts_N.argmax())
    assert text.splitlines()[2].startswith(f"| {slot} |")
    assert events.Scalars("train/usage/table0/gini")


def test_padding_reads_nothing_in_a_panel(tmp_path: Path) -> None:
    board = TensorBoardLogger(str(tmp_path), name="", version="board")
    made = counters(Tracer(Slots(name="slot", count=4)))
    traces = {0: {"slot_ids": torch.tensor([[[1], [1], [1]]]), "slot_weights": torch.ones(1, 3, 1)}}
    batch = {"input_ids": torch.tensor([[2, 3, 3]]), "valid": torch.tensor([[True, True, False]])}
    made.add(traces, batch)
    draw_on([board], made, traces, batch, Letters(), 1)
    board.finalize("success")
    (event,) = EventAccumulator(str(tmp_path / "board")).Reload().Tensors("usage/layer0.slot/most_read/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text.splitlines()[2:] == ["| 1 | 2 | 100.00% | `a` (1), `b` (1) |"]


def test_what_stopped_the_run_is_told_even_if_the_report_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise ValueError("the original fault")

    def broken(*_: Any) -> None:
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(usage_report, "report", broken)
    usage = instantiate(config(f"run_dir={tmp_path}")["callbacks"]["slot_usage"], "callbacks.slot_usage")
    with pytest.raises(ValueError, match="the original fault"):
        distributed_jobs.fit(
            distributed_jobs.settings("ffn=memory_plus", "strategy=single", steps=3), 3, watching=[usage, Fails()]
        )
