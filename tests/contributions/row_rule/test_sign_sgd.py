"""A fifth row rule, made of one Python file, one YAML and this test by the steps of CONTRIBUTING.md.

Letters: N rows, V values per row, L reads, X source rows.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from toys import config
from training.fits import fit, loader, rows, trainer

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.errors import ConfigError
from pkm_lightning.ops import row_update as op
from pkm_lightning.ops.row_update import (
    RowGradient,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_update,
    rules,
    state_bytes,
)
from pkm_lightning.training import LanguageModule

HERE = Path(__file__).parent
OPTIONS = [f"hydra.searchpath=[file://{HERE / 'configs'}]", "table/optimizer=sign_sgd", "trainer.max_steps=100"]
STEP = UpdateStep(lr=0.1)


@pytest.fixture(autouse=True, scope="module")
def _discovered() -> Iterator[None]:
    """Makes the file visible as if it lay in `ops/row_update/rules/`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "__path__", [*rules.__path__, str(HERE / "rules")])
        yield


def reads(n: int, v: int) -> RowGradient:
    """Returns the gradient of reads of rows 1 and 4, the latter twice."""
    return row_gradient(n, torch.tensor([4, 1, 4]), torch.randn(3), torch.tensor([0, 1, 1]), torch.randn(2, v))


def test_the_eager_update_is_the_formula_and_stands_in_for_missing_kernels(caplog: pytest.LogCaptureFixture) -> None:
    rule, gradient = find_rule("sign_sgd")(power=1.0), reads(6, 4)
    table_NV, state = torch.randn(6, 4), {"reads": torch.tensor([0, 3, 0, 0, 1, 9], dtype=torch.int32)}
    expected_NV = table_NV.clone()
    reads_LV = gradient.coefficients_L[:, None] * gradient.source_rows_XV[gradient.sources_L]
    expected_NV[1] -= 0.1 / 4 * reads_LV[1].sign()
    expected_NV[4] -= 0.1 / 2 * (reads_LV[0] + reads_LV[2]).sign()
    op._announce_fallback.cache_clear()
    with caplog.at_level(logging.INFO):
        row_update(table_NV, gradient, rule, STEP, state)
        row_update(table_NV.clone(), gradient, rule, STEP, copy.deepcopy(state))
    assert_close(table_NV, expected_NV)
    assert state["reads"].tolist() == [0, 4, 0, 0, 2, 9]
    assert [record.message for record in caplog.records if "sign_sgd" in record.message] == [
        "row_update: sign_sgd has no kernel of the cpu backend; its eager update runs instead"
    ]
    with pytest.raises(ValueError, match=r"backend='cpu' has no kernel for sign_sgd; use backend=eager"):
        row_update(table_NV, gradient, rule, STEP, state, backend="cpu")


def test_ranks_that_hold_columns_of_the_rows_learn_what_one_rank_learns() -> None:
    rule, gradient = find_rule("sign_sgd")(), reads(6, 4)
    table_NV = torch.randn(6, 4)
    parts = [(part, table_NV[:, part].contiguous()) for part in (slice(0, 2), slice(2, 4))]
    state = new_state(rule, table_NV)
    row_update(table_NV, gradient, rule, STEP, state)
    for part, part_NV in parts:
        local, kept = gradient._replace(source_rows_XV=gradient.source_rows_XV[:, part]), new_state(rule, part_NV)
        row_update(part_NV, local, rule, STEP, kept)
        assert torch.equal(part_NV, table_NV[:, part])
        assert torch.equal(kept["reads"], state["reads"])


def test_it_trains_in_a_trainer_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    given = config("model.dim=16", "model.ffn_dim=12", *OPTIONS)
    given["model"]["memory"] = None
    batches = [rows(4) for _ in range(4)]
    whole = fit(given, batches, precision="32-true")
    half = fit(given, batches[:2], precision="32-true", max_steps=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = LanguageModule(copy.deepcopy(given))
    trainer(precision="32-true", max_epochs=2).fit(
        resumed, loader([*batches[2:]]), ckpt_path=str(tmp_path / "half.ckpt")
    )
    (table,), (expected,) = resumed.model.tables, whole.model.tables
    state, expected_state = (m.trainer.optimizers[0].state for m in (resumed, whole))
    assert state[table.weight]["step"] == expected_state[expected.weight]["step"] == 4
    assert torch.equal(state[table.weight]["reads"], expected_state[expected.weight]["reads"])
    assert torch.equal(table.weight, expected.weight)
    assert state_bytes(find_rule("sign_sgd"), table.weight) == 4 * table.rows


def test_its_own_constants_are_checked() -> None:
    given = config(*OPTIONS)["table"]["optimizer"]
    for change, message in [
        ({"power": -1}, r"table.optimizer.power=-1 must be at least 0"),
        ({"pover": 1}, r"table.optimizer.pover is not a constant of sign_sgd; allowed: betas, eps, power"),
    ]:
        with pytest.raises(ConfigError, match=message):
            instantiate({**given, **change}, "table.optimizer")
