"""The ways in which tables learn, through the real Trainer: they agree, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from tolerances import assert_close
from toys import config
from training.fits import fit, rows, settings, split

from pkm_lightning.build.checks import check_learning, check_trainer, check_training
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.cli.resume import without_fused
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableOptimizer
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.table_learning import optimizer_state_bytes


def learned(*overrides: str, micro: list[int], **limits: float | None) -> LanguageModule:
    """Fits two steps of clipped gradient descent on unequal micro-batches and returns the module."""
    torch.manual_seed(2)
    batches = [rows(6) for _ in range(2)]
    changed = settings("placement=centred", "placement.count=2", "table.shared=true", *overrides)
    changed["optim"].update(limits)
    parts = [part for batch in batches for part in split(batch, micro)]
    return fit(changed, parts, accumulate_grad_batches=len(micro))


@pytest.mark.parametrize(
    ("plugin", "recomputed"),
    [("memory_plus", True), ("peer", False), ("ultramem", False), ("engram ffn.end_id=0", True), ("ple", True)],
    ids=str,
)
def test_rows_equal_the_dense_gradient(plugin: str, recomputed: bool) -> None:
    limits = {"clip_norm": 0.05, "table_clip_norm": 0.003}
    overrides = f"ffn={plugin}".split()
    expected = learned(*overrides, "table.learning=dense", micro=[1, 3, 2], **limits)
    # A forward that is recomputed in backward must stage its reads once.
    checkpointing = f"model.activation_checkpointing={recomputed}"
    actual = learned(*overrides, "table.learning=rows", checkpointing, micro=[1, 3, 2], **limits)
    for weight, other in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(weight.float(), other.float())
    for metric in ("train/loss", "train/grad_norm_table", "train/grad_norm_dense"):
        logged = [module.trainer.callback_metrics[metric].item() for module in (actual, expected)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5), metric


@pytest.mark.parametrize(("precision", "rule"), [("bf16-mixed", "lazy_adam"), ("bf16-true", "row_adagrad")])
def test_one_optimizer_trains_tables_in_half_precision_with_wide_states(
    precision: str, rule: str, tmp_path: Path
) -> None:
    changed = config("model.dim=16", "model.ffn_dim=12", f"table/optimizer={rule}", "trainer.max_steps=100")
    changed["model"]["memory"] = None
    monitor = LearningRateMonitor(logging_interval="step")
    watching = {"logger": CSVLogger(tmp_path), "callbacks": [monitor]}
    module = fit(changed, [rows(4), rows(4)], precision=precision, **watching)
    optimizer = module.trainer.optimizers[0]
    assert isinstance(optimizer, TableOptimizer)
    assert [group["name"] for group in optimizer.param_groups] == ["matrix", "gain", "table"]
    assert any("table" in name for name in monitor.lrs)
    (table,) = module.model.tables
    assert table.weight.dtype is (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert {v.dtype for v in optimizer.state[table.weight].values() if torch.is_tensor(v)} == {torch.float32}
    assert optimizer.state[table.weight]["step"] == 2
    assert table.weight.isfinite().all()


def test_settings_that_cannot_work_are_refused_before_anything_is_built() -> None:
    for overrides, message in [
        (["table.learning=sparse"], r"table.learning='sparse' is not known; allowed: dense, rows"),
        (["table.learning=fused"], r"table.learning=fused is no longer offered; set table.learning=rows"),
        (["trainer.precision=16-mixed"], r"precision=16-mixed does not work with table.learning=rows.*bf16-mixed"),
        (["trainer.precision=16-true"], r"precision=16-true does not work"),
        (["table/optimizer=catch_up_adam", "optim.table_weight_decay=0.1"], r"table_weight_decay=0.1: .*catch_up_adam"),
        (["table.optimizer.rule=adamw"], r"table.optimizer.rule='adamw' is not known"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_learning(config(*overrides))
    check_learning(config("table.learning=dense", "trainer.precision=16-mixed", "trainer.accumulate_grad_batches=3"))
    with pytest.raises(ConfigError, match=r"precision=16-true cannot train.*set trainer.precision=bf16-true"):
        check_training(config("table.learning=dense", "trainer.precision=16-true"), [])
    with pytest.raises(ConfigError, match=r"trainer.precision='transformer-engine' is not known; allowed: 32-true"):
        check_trainer(config("trainer.precision=transformer-engine")["trainer"])


def test_a_run_that_was_trained_with_fused_can_be_evaluated() -> None:
    saved = config("table.learning=fused", "optim.table_clip_norm=null")
    evaluated = without_fused(saved)
    check_learning(evaluated)
    assert saved["table"]["learning"] == "fused"
    assert {**evaluated["table"], "learning": "fused"} == saved["table"]
    assert without_fused(config("table.learning=dense")) == config("table.learning=dense")
    assert list(build_meta_model(evaluated).value_tables)


def test_state_bytes_are_those_of_the_rule() -> None:
    total = {}
    for rule in ("sgd", "row_adagrad", "lazy_adam"):
        changed = settings("ffn.n_keys=8", "ffn.value_dim=10")
        changed["table"]["optimizer"]["rule"] = rule
        total[rule] = optimizer_state_bytes(build_meta_model(changed), changed)
    assert total["row_adagrad"] - total["sgd"] == 4 * 64
    assert total["lazy_adam"] - total["sgd"] == 8 * 64 * 10
