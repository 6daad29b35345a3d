"""One training step of a value table, by every way of learning it: read, backward, clipping, optimizer.

All ways of a case share one table and, on the CPU, one pair of moments, so that they fit into memory side by side; the
check starts each from moments of zero. The rest of a step is the same for all: the weights of the reads require a
gradient, and the loss is the inner product of the reads with a fixed tensor.

Letters: T tokens, K rows a token, N rows, D values a row, R sampled rows, U rows that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from benchmark_inputs import Lookup, Reads, draw_ids, value_table
from benchmark_ways import bag, gather_einsum
from benchmarking import Case, Way, relative_error
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam

from pkm_lightning.memory import RowOptimizer, TableOptimizer, clip_tables

MAX_NORM, LR, EPS = 1.0, 1e-2, 1e-8
BETAS = {"adam": (0.9, 0.95), "catch_up_adam": (0.0, 0.95)}
# Updates of bf16 tables are rounded to an eighth of a percent of the row.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
BATCHES = 4


class StepWay(NamedTuple):
    """How a step is done.

    Args:
        name: in the table.
        rule: how rows move: `adam`, `catch_up_adam`, `row_adagrad` or `sgd`.
        learning: of the package's table (`dense`, `rows`), or `peer`.
        clip: the gradient's norm is clipped.
        read: a peer's read.
        sparse: a peer's optimizer is SparseAdam, not AdamW.
    """

    name: str
    rule: str
    learning: str
    clip: bool = True
    read: Callable[..., Tensor] | None = None
    sparse: bool = False


DENSE, DENSE_UNCLIPPED = "dense AdamW", "dense AdamW, no clip"
MAIN_WAYS = [
    StepWay(DENSE, "adam", "dense"),
    StepWay("gather + einsum, AdamW", "adam", "peer", read=gather_einsum),
    StepWay("embedding_bag, AdamW", "adam", "peer", read=bag),
    StepWay("rows lazy_adam", "adam", "rows"),
    StepWay("rows row_adagrad", "row_adagrad", "rows"),
]
WAYS = [
    *MAIN_WAYS,
    StepWay("rows catch_up_adam", "catch_up_adam", "rows"),
    StepWay("rows sgd", "sgd", "rows"),
    StepWay(DENSE_UNCLIPPED, "adam", "dense", clip=False),
    StepWay(
        "sparse embedding_bag, SparseAdam, no clip", "adam", "peer", False, functools.partial(bag, sparse=True), True
    ),
]
#: One for each kind of state.
MEMORY_WAYS = [way for way in WAYS if way.sparse or way.name == DENSE or way.learning == "rows"]


class Moments:
    """Tensors of the table's size that optimizers lend each other on the CPU, where fresh memory takes long."""

    def __init__(self, weight_ND: Tensor) -> None:
        self._weight_ND = weight_ND
        self._held: dict[str, Tensor] = {}

    def lend(self, state: dict[str, Tensor]) -> None:
        """Puts zeros of our own in the place of the large tensors of `state`."""
        if self._weight_ND.device.type != "cpu":
            return
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == self._weight_ND.shape:
                state[name] = self._held.setdefault(name, value).zero_()


class Step:
    """A built way: a call is one step on the next batch."""

    def __init__(self, way: StepWay, batches: list[Reads], moments: Moments, lr: float) -> None:
        self.way, self.batches, self.calls = way, batches, 0
        weight_ND = batches[0].table_ND
        own = way.learning != "peer"
        self.table = value_table(weight_ND, way.learning) if own else None
        self.weight = self.table.weight if self.table else nn.Parameter(weight_ND)
        self.weights = [batch.weights_TK.detach().clone().requires_grad_() for batch in batches]
        self.optimizer = self._optimizer(lr)
        moments.lend(self.optimizer.state[self.weight])

    def _optimizer(self, lr: float) -> Optimizer:
        if self.table is not None and self.table.stage is not None:
            rule = "lazy_adam" if self.way.rule == "adam" else self.way.rule
            rows = RowOptimizer(rule=rule, betas=BETAS.get(self.way.rule, BETAS["adam"]), eps=EPS)
            rest = SGD([nn.Parameter(self.weight.new_zeros(1))], lr=lr)
            return TableOptimizer(rest, {"table": self.table}, rows=rows, lr=lr)
        if self.way.sparse:
            dense: Optimizer = SparseAdam([self.weight], lr=lr, betas=BETAS["adam"], eps=EPS)
        else:
            dense = AdamW([self.weight], lr=lr, betas=BETAS["adam"], eps=EPS, weight_decay=0.0, fused=True)
        if self.weight.device.type == "cpu":
            # As the optimizer itself would in its first step.
            moments = {name: torch.zeros_like(self.weight) for name in ("exp_avg", "exp_avg_sq")}
            dense.state[self.weight] = {"step": 0 if self.way.sparse else torch.zeros(()), **moments}
        return dense

    def __call__(self) -> None:
        number = self.calls % len(self.batches)
        self.calls += 1
        self.step(self.batches[number], self.weights[number])

    def step(self, batch: Reads, weights_TK: Tensor) -> None:
        """Forward, backward, clipping, update."""
        self.optimizer.zero_grad(set_to_none=True)
        weights_TK.grad = None
        if self.table is not None:
            y_TD = self.table(batch.ids_TK, weights_TK)
        else:
            assert self.way.read is not None
            y_TD = self.way.read(self.weight, batch.ids_TK, weights_TK)
        (y_TD * batch.upstream_TD).sum().backward()
        if self.way.clip and self.table is not None and self.table.stage is not None:
            clip_tables([self.table], [], MAX_NORM)
        elif self.way.clip:
            nn.utils.clip_grad_norm_([self.weight], MAX_NORM)
        self.optimizer.step()


def step_case(
    sizes: Lookup, device: torch.device, dtype: torch.dtype, ways: list[StepWay], *, timed: bool = True
) -> Case:
    """All `ways` on one table; with `timed` off, their peak memory instead of their time."""
    first = Reads.draw(sizes, dtype, device)
    batches = [first, *(_another(first, sizes) for _ in range(BATCHES - 1))]
    moments = Moments(first.table_ND)
    gradient = functools.cache(lambda: _gradient(first))

    def build(way: StepWay) -> Step:
        return Step(way, batches, moments, _rate(way, *gradient()) if timed else LR)

    def error(step: Step) -> float:
        before_RD = first.table_ND[first.rows_R].double()
        for _ in range(2):
            step.step(first, step.weights[0])
        moved_RD = first.table_ND[first.rows_R].double() - before_RD
        grad_RD, norm = gradient()
        clipped_RD = grad_RD * min(1.0, MAX_NORM / norm) if step.way.clip else grad_RD
        return relative_error([moved_RD], [two_moves(step.way.rule, clipped_RD, _rate(step.way, grad_RD, norm))])

    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[Way(way.name, functools.partial(build, way)) for way in ways],
        error=error,
        tolerance=TOLERANCE[dtype],
        baselines=[DENSE, DENSE_UNCLIPPED] if timed else [DENSE],
        rebuild=device.type != "cpu",
        timed=timed,
        memory=not timed,
        held=first.table_ND.nbytes,
        values=first.table_ND.numel(),
    )


def _another(first: Reads, sizes: Lookup) -> Reads:
    weights_TK, upstream_TD = torch.rand_like(first.weights_TK), torch.randn_like(first.upstream_TD)
    return first._replace(ids_TK=draw_ids(sizes, first.table_ND.device), weights_TK=weights_TK, upstream_TD=upstream_TD)


def _gradient(reads: Reads) -> tuple[Tensor, float]:
    """The gradient of the sampled rows and the norm of the whole, in float64."""
    rows_U, place_TK = torch.unique(reads.ids_TK, return_inverse=True)
    grads_UD = torch.zeros(len(rows_U), reads.table_ND.shape[1], dtype=torch.float64, device=rows_U.device)
    for place_CK, weights_CK, upstream_CD in zip(
        place_TK.split(64), reads.weights_TK.split(64), reads.upstream_TD.split(64), strict=True
    ):
        parts_CKD = weights_CK.double().unsqueeze(-1) * upstream_CD.double().unsqueeze(1)
        grads_UD.index_add_(0, place_CK.flatten(), parts_CKD.flatten(0, 1))
    return reads.row_gradients(), grads_UD.norm().item()


def _rate(way: StepWay, grad_RD: Tensor, norm: float) -> float:
    """The learning rate; for plain gradient descent one that moves rows about as far as the others do."""
    if way.rule != "sgd":
        return LR
    return LR / (grad_RD.square().mean().sqrt().item() * min(1.0, MAX_NORM / norm))


def two_moves(rule: str, grad_RD: Tensor, lr: float) -> Tensor:
    """How far two steps of the same gradient move rows from moments of zero, in float64."""
    moved_RD = torch.zeros_like(grad_RD)
    mean_RD, square_RD, sum_R1 = torch.zeros_like(grad_RD), torch.zeros_like(grad_RD), torch.zeros_like(grad_RD[:, :1])
    beta1, beta2 = BETAS.get(rule, BETAS["adam"])
    for step in (1, 2):
        mean_RD = beta1 * mean_RD + (1 - beta1) * grad_RD
        square_RD = beta2 * square_RD + (1 - beta2) * grad_RD**2
        sum_R1 = sum_R1 + grad_RD.square().mean(dim=1, keepdim=True)
        if rule == "sgd":
            moved_RD -= lr * grad_RD
        elif rule == "row_adagrad":
            moved_RD -= lr * grad_RD / (sum_R1.sqrt() + EPS)
        else:
            moved_RD -= lr * mean_RD / (1 - beta1**step) / ((square_RD / (1 - beta2**step)).sqrt() + EPS)
    return moved_RD
