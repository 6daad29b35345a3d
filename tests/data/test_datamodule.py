"""The shared data module in a real trainer: resumes are exact, workers and micro-batches change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint

from pkm_lightning.data import FactsDataModule
from pkm_lightning.errors import ConfigError


class Recorder(pl.LightningModule):
    """A module that learns nothing and records the sequences of every optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sequences: list[list[int]] = []
        self.fillers = 0

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.sequences += batch["input_ids"].tolist()
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.fillers += int((batch["labels"] == -100).all())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(datamodule: FactsDataModule, directory: Path, *, steps: int, **options: Any) -> list[list[int]]:
    module = Recorder()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        val_check_interval=1000,
        num_sanity_val_steps=1,
        callbacks=[ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    trainer.fit(module, datamodule, ckpt_path=ckpt_path)
    return module.sequences


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_continues_the_sequences_of_the_first(
    facts: Callable[..., FactsDataModule], tmp_path: Path
) -> None:
    whole = fit(facts(), tmp_path / "a", steps=9)
    assert len(whole) == 9 * 8
    resumed = fit(facts(), tmp_path / "b", steps=7, ckpt_path=tmp_path / "a" / "step=3.ckpt")
    assert resumed == whole[3 * 8 : 7 * 8]
    again = fit(facts(num_workers=1), tmp_path / "c", steps=9, ckpt_path=tmp_path / "b" / "step=5.ckpt")
    assert again == whole[5 * 8 :]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_may_resume_with_another_micro_batch(facts: Callable[..., FactsDataModule], tmp_path: Path) -> None:
    whole = fit(facts(), tmp_path / "a", steps=9)
    resumed = fit(facts(), tmp_path / "b", steps=8, ckpt_path=tmp_path / "a" / "step=4.ckpt", accumulate_grad_batches=4)
    assert resumed == whole[4 * 8 : 8 * 8]
    datamodule = facts()
    again = fit(
        datamodule, tmp_path / "c", steps=9, ckpt_path=tmp_path / "b" / "step=6.ckpt", accumulate_grad_batches=2
    )
    assert again == whole[6 * 8 :]
    assert fit(datamodule, tmp_path / "d", steps=1) == whole[:8], "a new trainer without a checkpoint starts afresh"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_accumulation_sees_the_same_sequences_and_a_limited_epoch_continues(
    facts: Callable[..., FactsDataModule], tmp_path: Path
) -> None:
    whole = fit(facts(), tmp_path, steps=4)
    assert fit(facts(), tmp_path / "a", steps=4, accumulate_grad_batches=2) == whole
    assert fit(facts(), tmp_path / "b", steps=4, limit_train_batches=2) == whole


def test_a_new_trainer_starts_from_the_first_sequence(facts: Callable[..., FactsDataModule], tmp_path: Path) -> None:
    datamodule = facts()
    first = fit(datamodule, tmp_path, steps=2)
    assert fit(datamodule, tmp_path / "b", steps=2) == first
    assert datamodule.state_dict()["samples"] == 16


def test_worker_counts_change_nothing(
    prepared: FactsDataModule, facts: Callable[..., FactsDataModule], take: Callable[[Any, int], list[Any]]
) -> None:
    other = facts(num_workers=2)
    other.prepare_data()
    for one, two in zip(take(prepared.train_dataloader(), 5), take(other.train_dataloader(), 5), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_data_than_the_checkpoint_warns(
    facts: Callable[..., FactsDataModule], caplog: pytest.LogCaptureFixture
) -> None:
    state = facts().state_dict()
    other = facts(order_seed=4)
    other.load_state_dict(state)
    assert "differ from the checkpoint in order_seed" in caplog.text


def test_an_indivisible_batch_is_refused_before_training(facts: Callable[..., FactsDataModule], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.global_batch_size=8 .*accumulate_grad_batches=3.*global_batch_size=9"
    ):
        fit(facts(), tmp_path, steps=1, accumulate_grad_batches=3)


TWO_RANKS = """
import json, sys
import lightning.pytorch as pl
from conftest import FACTS, LOADER
from test_datamodule import Recorder
from pkm_lightning.data import FactsDataModule

class Reporter(Recorder):
    def on_fit_end(self):
        with open(f"{sys.argv[1]}/{self.global_rank}.json", "w") as file:
            json.dump([self.sequences, self.fillers], file)

trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=4, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    check_val_every_n_epoch=None, val_check_interval=4, num_sanity_val_steps=0,
)
trainer.fit(Reporter(), FactsDataModule(**LOADER, **{**FACTS, "eval_facts": 1}, cache_dir=sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_share_the_global_batch(facts: Callable[..., FactsDataModule], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", TWO_RANKS, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (one, fillers_one), (two, fillers_two) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    together = [sequence for i in range(0, 16, 4) for rank in (one, two) for sequence in rank[i : i + 4]]
    assert together == fit(facts(eval_facts=1), tmp_path / "alone", steps=4)
    assert (fillers_one, fillers_two) == (0, 1)


def test_the_configuration_follows_the_environment_and_the_seed_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PKM_LIGHTNING_CACHE", str(tmp_path))
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        config = compose("config", overrides=["data=text", "seed=5", f"data.path={tmp_path}"])
    datamodule = instantiate(config.data)
    assert datamodule.cache_dir == tmp_path
    assert datamodule.order_seed == 5
    assert datamodule.vocab_size == config.data.vocab_size
    assert list(tmp_path.iterdir()) == []


def test_the_custom_configuration_holds_nothing_but_its_target() -> None:
    assert (Path(__file__).parents[2] / "configs" / "data" / "custom.yaml").read_text() == "_target_: ???\n"
