"""The optimizer's part of a step of a table alone: the gradient is there, as a tensor or as the reads of the step."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.case import Case, Run, Way, relative_error
from benchmarks.inputs import Lookup, Reads
from benchmarks.steps import BETAS, EPS, LR, TOLERANCE, Moments, two_steps
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.ops import weighted_gather
from pkm_lightning.ops.row_update import UpdateStep, new_state, row_gradient, row_update
from pkm_lightning.ops.segments import read_sources

DENSE = "dense AdamW"
RULES = ("lazy_adam", "row_adagrad")


def update_case(sizes: Lookup, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case: torch's AdamW on a dense gradient, and the package's updates, which begin with the sort."""
    reads = Reads.draw(sizes, dtype, device)
    weight_NV, moments = reads.table_NV, Moments(reads.table_NV)
    gradient_RV = functools.cache(reads.row_gradients)

    def dense() -> Run:
        weight = nn.Parameter(weight_NV)
        weighted_gather(weight, reads.ids_TK, reads.weights_TK).backward(reads.upstream_TV)
        optimizer = AdamW([weight], lr=LR, betas=BETAS["adam"], eps=EPS, weight_decay=0.0, fused=True)
        state = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        moments.share(state)
        optimizer.state[weight] = {"step": torch.zeros((), device=device), **state}
        return optimizer.step

    def by_rows(name: str) -> Run:
        rule = RowOptimizer(rule=name, betas=BETAS["adam"], eps=EPS).rule
        state: dict[str, Tensor] = dict(new_state(rule, weight_NV))
        moments.share(state)
        numbers, (ids_L, sources_L) = itertools.count(1), (reads.ids_TK.flatten(), read_sources(reads.ids_TK).flatten())

        def run() -> None:
            number = next(numbers)
            gradient = row_gradient(sizes.rows, ids_L, reads.weights_TK.flatten(), sources_L, reads.upstream_TV)
            row_update(weight_NV, gradient, rule, UpdateStep(lr=LR, number=number, seed=number), state)

        return run

    def error(rule: str, run: Run) -> float:
        before_RV = weight_NV[reads.rows_R].double()
        # After one step Adam has moved rows by the gradient's sign, whatever its moments: a second step checks them.
        for _ in range(2):
            run()
        return relative_error([weight_NV[reads.rows_R].double() - before_RV], [two_steps(rule, gradient_RV(), LR)])

    checks: dict[Run, str] = {}

    def way(name: str, rule: str, build: Run) -> Way:
        def built() -> Run:
            run: Run = build()
            checks[run] = rule
            return run

        return Way(name, built)

    rules = [way(f"rows {name}", name, functools.partial(by_rows, name)) for name in RULES]
    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[way(DENSE, "adam", dense), *rules],
        error=lambda run: error(checks[run], run),
        tolerance=TOLERANCE[dtype],
        baselines=[DENSE],
        memory=False,
    )
