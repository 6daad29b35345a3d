"""Optimizers of single rows: what they keep for a row and how they move it.

With g the gradient of a row that was read, t the number of the update (from 1), and weight decay
`w <- w - lr * weight_decay * w` before each of them:

| rule | state | update of a row that was read |
|---|---|---|
| `sgd` | - | w <- w - lr g |
| `row_adagrad` | s, one number a row | s <- s + mean(g**2); w <- w - lr g / (sqrt(s) + eps) |
| `lazy_adam` | m, v as the row | m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g**2; w <- w - lr m' / (r + eps) |
| `catch_up_adam` | v as the row, last | v <- b2**(t - last) v + (1 - b2) g**2; last <- t; w <- w - lr g / (r + eps) |

with m' = m / (1 - b1**t), r = sqrt(v / (1 - b2**t)), and `last` one number a row. Rows that nobody read stay as they
are. For `sgd` and `row_adagrad` without decay that is the dense algorithm, since a zero gradient moves nothing; for
`catch_up_adam` too: it is Adam with b1 = 0, whose only trace of a zero gradient, the decay of v, is made up for when
the row is next read. `lazy_adam` is another algorithm than Adam, which goes on moving a row by its old momentum, and
forgets, while nobody reads it.

Row-wise Adagrad: Gupta et al. 2014, "Training Highly Multiclass Classifiers", section 5; Adam: Kingma and Ba 2014,
arXiv 1412.6980, algorithm 1; decoupled decay: Loshchilov and Hutter 2017, arXiv 1711.05101.

Letters: N rows, D values a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("sgd", "row_adagrad", "lazy_adam", "catch_up_adam")


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """One of the rules above with its numbers for one update.

    Args:
        kind: `sgd`, `row_adagrad`, `lazy_adam` or `catch_up_adam`.
        lr: learning rate of this update.
        weight_decay: decoupled, of the rows that are read.
        betas: b1 and b2 of Adam; b1 = 0 for `catch_up_adam`.
        eps: added to the root.
        step: number of this update, from 1.
        seed: of the stochastic rounding, 0 to 2**31 - 1; another one for every update.

    Raises:
        ValueError: an unknown kind or a number out of range.
    """

    kind: str
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    step: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"row_update: rule={self.kind!r} is unknown; allowed: {', '.join(KINDS)}.")
        if self.step < 1:
            raise ValueError(f"row_update: step={self.step}; updates are counted from 1.")
        if not all(0 <= beta < 1 for beta in self.betas) or (self.kind == "catch_up_adam" and self.betas[0]):
            raise ValueError(
                f"row_update: betas={self.betas}; each must be from 0 to below 1, and the first 0 for catch_up_adam."
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"row_update: seed={self.seed}; allowed: 0 to 2**31 - 1.")

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - b1**t and the root of 1 - b2**t."""
        beta1, beta2 = self.betas
        return 1 - beta1**self.step, (1 - beta2**self.step) ** 0.5

    def check_state(self, state: Mapping[str, Tensor], table_ND: Tensor) -> None:
        """Refuse a state that this rule did not make for this table.

        Raises:
            ValueError: names, shapes, dtypes or devices differ.
        """
        expected = state_shapes(self.kind, table_ND)
        found = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
        if found != expected or any(value.device != table_ND.device for value in state.values()):
            raise ValueError(f"row_update: {self.kind} needs the state {expected} on {table_ND.device}, got {found}.")


def state_shapes(kind: str, table_ND: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of what a rule keeps for a table."""
    n_rows, dim = table_ND.shape
    wide = torch.promote_types(table_ND.dtype, torch.float32)
    rows, values = ((n_rows,), wide), ((n_rows, dim), wide)
    shapes: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
        "sgd": {},
        "row_adagrad": {"sum": rows},
        "lazy_adam": {"exp_avg": values, "exp_avg_sq": values},
        "catch_up_adam": {"exp_avg_sq": values, "last_step": ((n_rows,), torch.int32)},
    }
    return shapes[kind]


def new_state(kind: str, table_ND: Tensor) -> dict[str, Tensor]:
    """Zeros of `state_shapes`, on the table's device."""
    return {
        name: torch.zeros(shape, dtype=dtype, device=table_ND.device)
        for name, (shape, dtype) in state_shapes(kind, table_ND).items()
    }
