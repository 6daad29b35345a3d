"""Training on a GPU: rules, tables on the host and in files, precisions; by the Trainer and by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from processes import assert_continues_bit_for_bit
from small import SMALL_RUN, Run, record, rows
from tolerances import assert_same_on_devices
from torch import Tensor
from training.fits import fit, settings, split
from training.fits import rows as batch_of

from pkm_lightning.model import Transformer

pytestmark = pytest.mark.gpu
FFNS = ["dense", "memory_plus", "memory", "pkm", "peer", "ultramem", "ultramem_v2", "moe", "engram", "ple", "stem"]
GPU = ("trainer.accelerator=gpu", *SMALL_RUN)


class SameStart(L.Callback):
    """Gives every fit the weights with which the first one started: random draws differ from device to device."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self.devices: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.devices += [pl_module.model.tables[0].weight.device.type]  # type: ignore[index, union-attr]
        if self.weights is None:
            self.weights = {name: value.cpu().clone() for name, value in pl_module.state_dict().items()}
        pl_module.load_state_dict(self.weights)


def fitted(*overrides: str, rule: str = "sgd", table: str = "cuda") -> list[Transformer]:
    """Fits on the CPU and on the GPU: three steps in fp32, two micro-batches each, with clipping.

    Args:
        table: where the GPU's fit has its table.
    """
    changed = settings(*overrides, lr=0.1)
    betas = {"betas": [0.0, 0.95]} if rule in ("factored_adam", "catch_up_adam") else {}
    changed["table"]["optimizer"] = {"_target_": "pkm_lightning.memory.RowOptimizer", "rule": rule, **betas}
    changed["optim"].update(clip_norm=0.5, table_clip_norm=0.1)
    parts, start = [part for _ in range(3) for part in split(batch_of(6), [4, 2])], SameStart()
    common: dict[str, Any] = {"accumulate_grad_batches": 2, "precision": "32-true", "callbacks": [start]}
    models = [fit(changed, parts, accelerator=accelerator, **common).model for accelerator in ("cpu", "gpu")]
    assert start.devices == ["cpu", table]
    return models


@pytest.mark.parametrize("ffn", ["memory_plus", "peer", "ultramem_v2", "engram ffn.end_id=0", "ple", "stem"])
@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_a_fit_equals_that_of_the_cpu(ffn: str, learning: str) -> None:
    """Compares the weights as a whole: some gradients are rounding alone, as those of a bias before a normalisation."""
    models = fitted(*f"ffn={ffn}".split(), f"table.learning={learning}")
    expected_N, actual_N = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert_same_on_devices(actual_N, expected_N, "weights")
    assert_same_on_devices(models[1].tables[0].weight, models[0].tables[0].weight, "table")


@pytest.mark.parametrize("rule", ["lazy_adam", "factored_adam", "row_adagrad", "catch_up_adam"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_rules_learn_as_on_the_cpu(rule: str, device: str) -> None:
    """Adam's first steps follow signs, which rounding can turn where a gradient is near 0: few values may differ."""
    place = "cuda" if device == "auto" else "cpu"
    models = fitted("ffn=memory_plus", f"table.device={device}", rule=rule, table=place)
    expected_NV, actual_NV = (model.tables[0].weight for model in models)
    differ = ~torch.isclose(actual_NV, expected_NV, rtol=1e-3, atol=1e-4)
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("ffn", FFNS)
def test_a_run_learns_and_its_checkpoint_is_read_again(ffn: str, cli: Run, tmp_path: Path) -> None:
    run = cli("fit", f"ffn={ffn}", *GPU, "run_dir=run")
    assert run.code == 0, run.err[-2000:]
    assert record(tmp_path / "run")["device"] == torch.cuda.get_device_name()
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run") if row.get("train/loss")]
    assert losses[-1] < losses[0]
    asked = ("prompt=Question:", "max_new_tokens=4")
    for command in (["validate"], ["generate", *asked], ["generate", *asked, "table.device=mmap"]):
        if "table.device=mmap" in command and ffn in ("dense", "moe"):
            continue
        outcome = cli(*command, "run_dir=run")
        assert outcome.code == 0, outcome.err[-2000:]


@pytest.mark.parametrize(
    "overrides",
    [
        ["ffn=memory_plus", "trainer.precision=bf16-mixed"],
        ["ffn=engram", "trainer.precision=bf16-mixed", "table.device=cpu"],
        ["ffn=memory_plus", "trainer.precision=bf16-true", "table.device=cpu"],
        ["ffn=memory_plus", "strategy=ddp"],
        ["ffn=memory_plus", "strategy=fsdp", "table.shard=row"],
        ["ffn=memory_plus", "extra_ffns=engram"],
        ["ffn=memory_plus", "model.compile=true"],
    ],
    ids=" ".join,
)
def test_ways_of_training(overrides: list[str], cli: Run) -> None:
    run = cli("fit", *overrides, *GPU, "run_dir=run")
    assert run.code == 0, run.err[-2000:]


@pytest.mark.parametrize("overrides", [["ffn=memory_plus"], ["ffn=engram", "table.device=cpu"]], ids=" ".join)
def test_a_continued_run_has_the_bits_of_one_that_was_not_interrupted(
    overrides: list[str], cli: Run, tmp_path: Path
) -> None:
    assert_continues_bit_for_bit(cli, tmp_path, "fit", *overrides, *GPU)
