"""Two processes on the CPU from one command: the losses of one process, a sweep run once, a run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import finish, fit, metrics, start
from small import SMALL_RUN

DDP = ["strategy=ddp", "trainer.devices=2"]
# Adam divides by the size of the gradients and so magnifies rounding errors; SGD does not.
SGD = [
    "optim.optimizer._target_=torch.optim.SGD",
    "~optim.optimizer.betas",
    "~optim.optimizer.eps",
    "optim.lr=0.5",
    "table/optimizer=sgd",
]


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "ffn").mkdir(parents=True)
    (tmp_path / "mine" / "ffn" / "narrow.yaml").write_text("_target_: pkm_lightning.ffn.Dense\nhidden_dim: 16\n")
    return tmp_path


@pytest.mark.slow  # tests/strategies compares all strategies
def test_two_ranks_and_accumulation_reach_the_losses_of_one(tmp_path: Path) -> None:
    finish(fit(*SGD, "run_dir=one", cwd=tmp_path))
    finish(fit(*SGD, *DDP, "run_dir=two", cwd=tmp_path))
    three = ["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=12"]
    finish(fit(*SGD, *three, "run_dir=three", cwd=tmp_path))
    one = metrics(tmp_path / "one")
    assert len(one) == 9
    for other in ("two", "three"):
        for mine, theirs in zip(one, metrics(tmp_path / other), strict=True):
            assert mine["step"] == theirs["step"]
            assert mine["tokens"] == theirs["tokens"]
            for name in ("train/loss", "train/grad_norm_dense", "train/grad_norm_table", "val/loss"):
                if mine[name]:
                    assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), (
                        other,
                        name,
                        mine["step"],
                    )


@pytest.mark.slow  # tests/strategies compares all strategies
@pytest.mark.parametrize(
    "ffn",
    [
        pytest.param(
            ["ffn=moe", "ffn.balance_loss=0.5", "ffn.z_loss=0.1", "ffn.sequence_balance_loss=0.1"],
            marks=pytest.mark.slow,
        ),
        ["ffn=pkm", "ffn.cures.entropy_loss=0.5", "ffn.cures.balance_loss=0.1"],
        pytest.param(
            ["ffn=moe", "ffn.balancing=bias", "ffn.bias_rate=0.05", "model.activation_checkpointing=true"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["balanced by loss", "batch norm and losses on the halves", "balanced by bias"],
)
def test_statistics_of_the_batch_are_those_of_all_ranks(tmp_path: Path, ffn: list[str]) -> None:
    """Checks batches whose rows are padded unequally and mostly no targets, so that the ranks' shares differ."""
    steps = ["trainer.max_steps=6", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]
    finish(fit(*SGD, *ffn, *steps, "run_dir=one", cwd=tmp_path))
    finish(fit(*SGD, *ffn, *steps, *DDP, "run_dir=two", cwd=tmp_path))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    compared = 0
    for mine, theirs in zip(one, two, strict=True):
        # Each rank logs its own largest load, and diagnostics look at the first sequences of every rank.
        for name in {*mine} - {"step", "tokens", "train/expert_load_max"}:
            if mine[name] and not name.startswith("train/vitals/"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), (name, mine["step"])
                compared += name.startswith("train/aux_")
    assert compared >= 6


@pytest.mark.slow
def test_a_sweep_with_a_config_dir_over_two_ranks(plugins: Path) -> None:
    sweep = ["fit", "-m", "--config-dir=mine", *SMALL_RUN, *DDP, "trainer.max_steps=4"]
    out = finish(start(*sweep, "ffn=narrow,dense", "run_dir=sweep", cwd=plugins))
    assert out.count("run directory:") == 2
    sizes = []
    for job in ("0", "1"):
        record = json.loads((plugins / "sweep" / job / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["world_size"] == 2
        sizes.append(record["params"]["total"])
    assert sizes[1] - sizes[0] == 2 * 3 * 64 * (172 - 16)
    assert {p.name for p in (plugins / "sweep").iterdir()} == {"0", "1", "multirun.yaml"}
    assert {p.name for p in plugins.iterdir()} == {"mine", "sweep"}


@pytest.mark.slow
def test_two_ranks_resume_a_run_without_repeating_its_overrides(tmp_path: Path) -> None:
    finish(fit(*DDP, "ffn=dense", "run_dir=run", cwd=tmp_path))
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "status": "running"}))
    finish(start("fit", "run_dir=run", cwd=tmp_path))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["ffn"], record["world_size"]) == ("finished", "Dense", 2)
