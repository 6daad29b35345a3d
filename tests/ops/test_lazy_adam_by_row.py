"""Lazy Adam with bias corrections by row: each row is torch's Adam on its own reads.

Letters: N rows, V values per row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.ops.row_update import RowGradient, UpdateStep, find_rule, new_state, row_gradient, row_update
from pkm_lightning.ops.row_update.rules import lazy_adam

BETAS = (0.9, 0.95)
RULE = find_rule("lazy_adam")(betas=BETAS, bias_correction="row")


def reads(rows: list[int], n_rows: int, v: int, dtype: torch.dtype) -> RowGradient:
    coefficients = torch.ones(len(rows), dtype=dtype)
    return row_gradient(
        n_rows, torch.tensor(rows), coefficients, torch.arange(len(rows)), torch.randn(len(rows), v, dtype=dtype)
    )


@pytest.mark.usefixtures("on_the_backends_device")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float64), ("cpu", torch.float32), ("triton", torch.float32)]
)
def test_each_row_is_adam_on_its_own_reads(backend: str, dtype: torch.dtype) -> None:
    table_NV = torch.randn(3, 4, dtype=dtype)
    rows = [nn.Parameter(row_V.clone()) for row_V in table_NV]
    adams = [torch.optim.Adam([row_V], lr=0.1, betas=BETAS, eps=1e-8) for row_V in rows]
    state = new_state(RULE, table_NV)
    for number in range(1, 16):
        read = [0, *([1] if number % 3 == 0 else []), *([2] if number > 12 else [])]
        gradient = reads(read, 3, 4, dtype)
        row_update(table_NV, gradient, RULE, UpdateStep(lr=0.1, number=number), state, backend=backend)
        for row, grad_V in zip(read, gradient.source_rows_XV, strict=True):
            rows[row].grad = grad_V.clone()
            adams[row].step()
    assert_close(table_NV, torch.stack([row_V.detach() for row_V in rows]), kind="grad")
    assert state["updates"].tolist() == [15, 5, 3]


def test_a_late_first_read_moves_by_the_rate_and_by_the_tables_number_by_less() -> None:
    moves = {}
    for whose in ("row", "table"):
        rule = find_rule("lazy_adam")(betas=BETAS, bias_correction=whose)
        table_NV = torch.zeros(1, 4)
        row_update(
            table_NV, reads([0], 1, 4, torch.float32), rule, UpdateStep(lr=0.1, number=1000), new_state(rule, table_NV)
        )
        moves[whose] = table_NV.abs()
    assert_close(moves["row"], torch.full((1, 4), 0.1))
    assert_close(moves["table"], torch.full((1, 4), 0.1 * 0.1 / 0.05**0.5))


def test_the_count_stops_where_the_correction_is_one() -> None:
    table_NV = torch.zeros(1, 4)
    for betas in (BETAS, (0.0, 0.999), (0.9994, 0.5)):
        rule = find_rule("lazy_adam")(betas=betas, bias_correction="row")
        state = new_state(rule, table_NV)
        state["updates"].fill_(lazy_adam._LAST_COUNT)
        row_update(table_NV, reads([0], 1, 4, torch.float32), rule, UpdateStep(lr=0.1), state)
        assert state["updates"].tolist() == [32767]
        corrections = rule.row_corrections(state["updates"])  # type: ignore[attr-defined]
        assert corrections.float().tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rule": "lazy_adam", "bias_correction": "rows"},
            r"table.optimizer.bias_correction='rows' is not known; allowed: table, row",
        ),
        ({"rule": "lazy_adam", "bias_correction": 3}, r"table.optimizer.bias_correction=3 is not known"),
        (
            {"rule": "sgd", "bias_correction": "row"},
            r"table.optimizer.bias_correction is not a constant of sgd; allowed: betas, eps",
        ),
        (
            {"rule": "lazy_adam", "bias_correction": "row", "betas": (0.9, 0.9999)},
            r"table.optimizer.betas=\[0.9, 0.9999\]: with bias_correction=row each must be at most 0.9994",
        ),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowOptimizer(**arguments)
