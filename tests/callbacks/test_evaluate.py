"""Evaluate logs the harness's figures of the model as it is, and training does not notice it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from local_tasks import write_tasks
from toys import config
from training.fits import loader

from pkm_lightning.callbacks import Evaluate, MetricsCSV
from pkm_lightning.callbacks.evaluate import _stopped_clocks
from pkm_lightning.callbacks.stopwatch import TimedCallback
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.inference.harness import HarnessModel
from pkm_lightning.inference.harness_results import run_tasks, scores_of
from pkm_lightning.inference.harness_tasks import load_tasks
from pkm_lightning.training import LanguageModule

Arguments = dict[str, Any]
CONTEXT = 48


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"), 6, longest=4, words=2)
    return {"tasks": ["options", "answers"], "tasks_dir": str(folder), "every_n_steps": None, "limit": 4,
            "num_fewshot": None, "batch_size": 4}  # fmt: skip


class Data(L.LightningDataModule):
    """Random bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = bytes_tokenizer()

    def train_dataloader(self) -> Any:
        return self._batches(1)

    def val_dataloader(self) -> Any:
        return self._batches(2)

    def _batches(self, seed: int) -> Any:
        dice = torch.Generator().manual_seed(seed)
        ids = [torch.randint(258, (3, 8), generator=dice) for _ in range(8)]
        return loader([{"input_ids": ids_BT, "labels": ids_BT.roll(-1, 1)} for ids_BT in ids])


class Losses(L.Callback):
    """The losses of all steps, and how many parts of the model were in training."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.model.blocks[1].ffn.eval()  # as a user does who freezes a part

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append((float(trainer.callback_metrics["train/loss"]), sum(m.training for m in pl_module.modules())))


class Kept(DummyLogger):
    """What was logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.eval: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        if any(name.startswith("eval/") for name in metrics):
            assert step not in self.eval
            self.eval[step] = metrics


def fit(watching: list[L.Callback], data: L.LightningDataModule | None = None, **changes: Any) -> LanguageModule:
    settings = config("model.dim=16", "model.ffn_dim=12", "model.memory.n_keys=8", "model.vocab_size=258",
                      f"data.seq_len={CONTEXT}", "trainer.max_steps=100")  # fmt: skip
    settings["ffn"] = {"_target_": "toys.Reporter", "dropout": 0.3}
    trainer = L.Trainer(**{
        "accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 4, "log_every_n_steps": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "val_check_interval": 2, "limit_val_batches": 1, "callbacks": watching, **changes,
    })  # fmt: skip
    torch.manual_seed(0)  # the toy takes its weights from it
    module = LanguageModule(settings)
    trainer.fit(module, datamodule=data or Data())
    return module


@pytest.mark.parametrize("every_n_steps", [None, 1])
def test_training_is_the_same_bit_for_bit(usual: Arguments, every_n_steps: int | None) -> None:
    without, beside = Losses(), Losses()
    evaluate = Evaluate(**{**usual, "every_n_steps": every_n_steps})
    plain, watched = fit([without]), fit([evaluate, beside])
    assert evaluate.step == 4
    assert without.seen == beside.seen
    assert len(set(beside.seen)) == 4
    for (name, ours), theirs in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_figures_are_those_of_the_model_at_that_step(usual: Arguments, caplog: pytest.LogCaptureFixture) -> None:
    logger, evaluate = Kept(), Evaluate(**usual)
    with caplog.at_level(logging.INFO):
        module = fit([evaluate], logger=logger)
    # Not before training, when Lightning tries the validation.
    assert list(logger.eval) == [2, 4]
    lm = HarnessModel(
        module.model.eval(),
        bytes_tokenizer(),
        context=CONTEXT,
        device=torch.device("cpu"),
        batch_size=2,
        progress=False,
    )
    tasks = load_tasks(usual["tasks"], tasks_dir=Path(usual["tasks_dir"]), num_fewshot=None)
    scores = scores_of(run_tasks(lm, tasks, limit=4, bootstraps=0, progress=False))
    expected = {f"eval/{score.task}_{score.metric}": score.value for score in scores}
    assert set(expected) == {"eval/options_acc", "eval/options_acc_norm", "eval/answers_exact_match"}
    assert logger.eval[4] == evaluate.metrics == expected
    assert "benchmarks at step 4: options_acc " in caplog.text


def test_figures_of_an_interval_are_in_the_row_of_their_step_alone(usual: Arguments, tmp_path: Path) -> None:
    logger, path = Kept(), tmp_path / "metrics.csv"
    fit([Evaluate(**{**usual, "every_n_steps": 3}), MetricsCSV(path=str(path))], logger=logger, max_steps=7)
    assert list(logger.eval) == [3, 6]
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows if row["eval/options_acc"]] == ["3", "6"]
    assert len(rows) == 7


def test_the_clocks_of_training_stand_still_meanwhile() -> None:
    timed = TimedCallback()
    timed.stopwatch.start()
    with _stopped_clocks(SimpleNamespace(callbacks=[timed])):  # type: ignore[arg-type]
        assert timed.stopwatch.seconds == timed.stopwatch.seconds
    assert timed.stopwatch.seconds < timed.stopwatch.seconds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "callbacks.evaluate.tasks=[] names no task"),
        ({"tasks": [3]}, "callbacks.evaluate.tasks=[3] is not a list of names"),
        ({"limit": 0}, "callbacks.evaluate.limit=0 is out of range"),
        ({"num_fewshot": -1}, "callbacks.evaluate.num_fewshot=-1 is out of range"),
        ({"every_n_steps": 0}, "callbacks.evaluate.every_n_steps=0 is out of range"),
        ({"batch_size": 0.5}, "callbacks.evaluate.batch_size=0.5 is out of range"),
    ],
)
def test_bad_values_are_named(usual: Arguments, changes: Arguments, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Evaluate(**{**usual, **changes})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_interval_at_which_nothing_is_logged_is_refused(usual: Arguments) -> None:
    evaluate = Evaluate(**{**usual, "every_n_steps": 6})
    evaluate.check({"trainer": {"log_every_n_steps": 3}})
    with pytest.raises(ConfigError, match=r"every_n_steps=6 is not a multiple of trainer\.log_every_n_steps=4"):
        evaluate.check({"trainer": {"log_every_n_steps": 4}})


def test_training_does_not_start_without_the_tasks_or_a_tokenizer(usual: Arguments) -> None:
    losses = Losses()
    with pytest.raises(DataError, match="make a folder of tasks with: prepare data=benchmarks"):
        fit([Evaluate(**{**usual, "tasks_dir": "nowhere"}), losses])

    class Silent(Data):
        def __init__(self) -> None:
            super().__init__()
            del self.tokenizer

    with pytest.raises(ConfigError, match=r"callbacks\.evaluate needs a tokenizer, and Silent has none"):
        fit([Evaluate(**usual), losses], Silent())
    assert losses.seen == []
