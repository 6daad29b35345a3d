"""The ways of learning through the real Trainer: equal where they should be, refused where they cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from tolerances import assert_close
from toys import config
from training.fits import fit, loader, rows, settings, split, trainer

from pkm_lightning.build.model import build_model
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableOptimizer
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.table_learning import check_learning, optimizer_state_bytes

PLUGINS = ["memory_plus", "peer", "ultramem"]


def learned(*overrides: str, micro: list[int] | None = None, **limits: float | None) -> LanguageModule:
    """Three steps of gradient descent, clipped and of unequal micro-batches where asked for."""
    torch.manual_seed(2)
    batches = [rows(6) for _ in range(3)]
    given = settings("placement=centred", "placement.count=2", "table.shared=true", *overrides)
    given["optim"].update(limits)
    if micro is None:
        return fit(given, batches)
    parts = [part for batch in batches for part in split(batch, micro)]
    return fit(given, parts, accumulate_grad_batches=len(micro))


def assert_same_weights(actual: LanguageModule, expected: LanguageModule) -> None:
    for weight, other in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(weight.float(), other.float())


@pytest.mark.parametrize("plugin", PLUGINS)
def test_rows_equal_the_dense_gradient(plugin: str) -> None:
    limits = {"clip_norm": 0.05, "table_clip_norm": 0.003}
    expected = learned(f"ffn={plugin}", "table.learning=dense", micro=[1, 3, 2], **limits)
    actual = learned(f"ffn={plugin}", "table.learning=rows", micro=[1, 3, 2], **limits)
    assert_same_weights(actual, expected)
    for metric in ("train/loss", "train/grad_norm_table", "train/grad_norm_dense"):
        shown = [module.trainer.callback_metrics[metric].item() for module in (actual, expected)]
        assert shown[0] == pytest.approx(shown[1], rel=1e-5), metric


def test_fused_equals_the_dense_gradient() -> None:
    assert_same_weights(learned("table.learning=fused"), learned("table.learning=dense"))


def test_fused_notices_a_callback_that_accumulates() -> None:
    module = LanguageModule(settings("table.learning=fused"))
    callbacks = [GradientAccumulationScheduler(scheduling={0: 2})]
    with pytest.raises(ConfigError, match=r"fused cannot accumulate, but 2 micro-batches make a step"):
        trainer(callbacks=callbacks).fit(module, loader([rows(2), rows(2)]))


def test_a_recomputed_forward_changes_nothing() -> None:
    assert_same_weights(learned("model.activation_checkpointing=true"), learned())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("rule", ["lazy_adam", "row_adagrad"])
def test_half_precision_trains_tables_with_wide_states(precision: str, rule: str) -> None:
    given = config("model.dim=16", "model.ffn_dim=12", f"table/optimizer={rule}", "trainer.max_steps=100")
    given["model"]["memory"] = None
    module = fit(given, [rows(4), rows(4)], precision=precision)
    optimizer = module.trainer.optimizers[0]
    assert isinstance(optimizer, TableOptimizer)
    (table,) = module.model.tables
    assert table.weight.dtype is (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert {v.dtype for v in optimizer.state[table.weight].values() if torch.is_tensor(v)} == {torch.float32}
    assert optimizer.state[table.weight]["step"] == 2
    assert table.weight.isfinite().all()


def test_one_optimizer_and_its_groups_have_names_for_monitors(tmp_path: Any) -> None:
    module = LanguageModule(settings("table/optimizer=lazy_adam"))
    monitor = LearningRateMonitor(logging_interval="step")
    logger = CSVLogger(tmp_path)
    trainer(logger=logger, callbacks=[monitor]).fit(module, loader([rows(2)]))
    assert [group["name"] for group in module.trainer.optimizers[0].param_groups] == ["matrix", "gain", "table"]
    assert any("table" in name for name in monitor.lrs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["table.learning=sparse"], r"table.learning='sparse' is not known; allowed: dense, rows, fused"),
        (["trainer.precision=16-mixed"], r"precision=16-mixed does not work with table.learning=rows.*bf16-mixed"),
        (["trainer.precision=16-true", "table.learning=fused"], r"precision=16-true does not work"),
        (["table.learning=fused", "trainer.accumulate_grad_batches=2"], r"cannot accumulate .*=2\); say table.lea"),
        (["table.learning=fused"], r"optim.table_clip_norm=1.0\); set optim.table_clip_norm=null"),
        (["table/optimizer=catch_up_adam", "optim.table_weight_decay=0.1"], r"table_weight_decay=0.1: .*catch_up_adam"),
        (["table.optimizer.rule=adamw"], r"table.optimizer.rule='adamw' is not known"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_learning(config(*overrides))


def test_dense_allows_what_rows_refuse() -> None:
    check_learning(config("table.learning=dense", "trainer.precision=16-mixed", "trainer.accumulate_grad_batches=3"))


def test_state_bytes_are_those_of_the_rule() -> None:
    found = {}
    for rule in ("sgd", "row_adagrad", "lazy_adam"):
        given = settings("ffn.n_keys=8", "ffn.value_dim=10")
        given["table"]["optimizer"]["rule"] = rule
        found[rule] = optimizer_state_bytes(build_model(given), given)
    assert found["row_adagrad"] - found["sgd"] == 4 * 64
    assert found["lazy_adam"] - found["sgd"] == 8 * 64 * 10
