"""One training step of a value table, by every way of learning it: read, backward, clipping, optimizer.

All ways of a case share one table and, on the CPU, one pair of moments, so that they fit into memory together; the
check starts each from moments of zero. The rest of a step is the same for all: the weights of the reads require a
gradient, and the loss is the inner product of the reads with a fixed tensor.

Letters: R sampled rows, U rows that are read, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam

from benchmarks.case import Case, Way, relative_error
from benchmarks.inputs import Lookup, Reads, draw_ids, value_table
from benchmarks.ways import bag, gather_einsum
from pkm_lightning.memory import RowOptimizer, TableOptimizer, clip_tables
from pkm_lightning.ops.huge_pages import use_huge_pages

MAX_NORM, LR, EPS = 1.0, 1e-2, 1e-8
BETAS = {"adam": (0.9, 0.95), "catch_up_adam": (0.0, 0.95)}
# Updates of bf16 tables are rounded to an eighth of a percent of the row.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
BATCHES = 4


class StepWay(NamedTuple):
    """A way of doing a step.

    Args:
        name: shown in the results.
        rule: update rule of the rows: `adam`, `catch_up_adam`, `row_adagrad` or `sgd`.
        learning: `table.learning` of the package's table (`dense`, `rows`), or `peer` for a plain tensor.
        clip: whether the gradient's norm is clipped.
        read: how a `peer` reads.
        sparse: whether a `peer` uses SparseAdam instead of AdamW.
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
    StepWay("rows lazy_adam, no clip", "adam", "rows", clip=False),
    StepWay("rows row_adagrad, no clip", "row_adagrad", "rows", clip=False),
]
#: One for each kind of optimizer state.
MEMORY_WAYS = [way for way in WAYS if way.sparse or way.name == DENSE or (way.learning == "rows" and way.clip)]


class Moments:
    """Tensors of the table's size that the optimizers of all ways share on the CPU, where new pages are slow."""

    def __init__(self, weight_NV: Tensor) -> None:
        self._weight_NV = weight_NV
        self._moments: dict[str, Tensor] = {}

    def share(self, state: dict[str, Tensor]) -> None:
        """Replaces the large tensors of `state` by the shared ones, zeroed."""
        if self._weight_NV.device.type != "cpu":
            return
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == self._weight_NV.shape:
                if name not in self._moments:
                    # In the pages in which the package keeps states, for all contenders alike.
                    self._moments[name] = use_huge_pages(torch.empty_like(value))
                state[name] = self._moments[name].zero_()


class Step:
    """Built way of doing a step: a call is one step on the next batch."""

    def __init__(self, way: StepWay, batches: list[Reads], moments: Moments, lr: float) -> None:
        self.way, self.batches, self.calls = way, batches, 0
        weight_NV = batches[0].table_NV
        self.table = None if way.learning == "peer" else value_table(weight_NV, way.learning)
        self.weight = self.table.weight if self.table else nn.Parameter(weight_NV)
        self.weights = [batch.weights_TK.detach().clone().requires_grad_() for batch in batches]
        self.optimizer = self._optimizer(lr)
        moments.share(self.optimizer.state[self.weight])

    def _optimizer(self, lr: float) -> Optimizer:
        if self.table is not None and self.table.stage is not None:
            rule = "lazy_adam" if self.way.rule == "adam" else self.way.rule
            rows = RowOptimizer(rule=rule, betas=BETAS.get(self.way.rule, BETAS["adam"]), eps=EPS)
            # A TableOptimizer wraps the optimizer of all other parameters; here there are none, so it gets a dummy.
            rest = SGD([nn.Parameter(self.weight.new_zeros(1))], lr=lr)
            return TableOptimizer(rest, {"table": self.table}, rows=rows, lr=lr)
        if self.way.sparse:
            dense: Optimizer = SparseAdam([self.weight], lr=lr, betas=BETAS["adam"], eps=EPS)
        else:
            dense = AdamW([self.weight], lr=lr, betas=BETAS["adam"], eps=EPS, weight_decay=0.0, fused=True)
        if self.weight.device.type == "cpu":
            # The state that the optimizer would create in its first step; it must exist to be shared.
            moments = {name: torch.zeros_like(self.weight) for name in ("exp_avg", "exp_avg_sq")}
            dense.state[self.weight] = {"step": 0 if self.way.sparse else torch.zeros(()), **moments}
        return dense

    def __call__(self) -> None:
        number = self.calls % len(self.batches)
        self.calls += 1
        self.step(self.batches[number], self.weights[number])

    def step(self, batch: Reads, weights_TK: Tensor) -> None:
        """Runs forward, backward, clipping and update."""
        self.optimizer.zero_grad(set_to_none=True)
        weights_TK.grad = None
        if self.table is not None:
            y_TV = self.table(batch.ids_TK, weights_TK)
        else:
            assert self.way.read is not None
            y_TV = self.way.read(self.weight, batch.ids_TK, weights_TK)
        (y_TV * batch.upstream_TV).sum().backward()
        if self.way.clip and self.table is not None and self.table.stage is not None:
            clip_tables([self.table], [], MAX_NORM)
        elif self.way.clip:
            nn.utils.clip_grad_norm_([self.weight], MAX_NORM)
        self.optimizer.step()


def step_case(
    sizes: Lookup, device: torch.device, dtype: torch.dtype, ways: list[StepWay], *, timed: bool = True
) -> Case:
    """Builds the case of all `ways` on one table; with `timed` off it measures peak memory instead of time."""
    first = Reads.draw(sizes, dtype, device)
    batches = [first, *(_another(first, sizes) for _ in range(BATCHES - 1))]
    moments = Moments(first.table_NV)
    gradient = functools.cache(lambda: _gradient(first))

    def build(way: StepWay) -> Step:
        return Step(way, batches, moments, _rate(way, *gradient()) if timed else LR)

    def error(step: Step) -> float:
        before_RV = first.table_NV[first.rows_R].double()
        # After one step Adam has moved rows by the gradient's sign, whatever its moments: a second step checks them.
        for _ in range(2):
            step.step(first, step.weights[0])
        moved_RV = first.table_NV[first.rows_R].double() - before_RV
        grad_RV, norm = gradient()
        clipped_RV = grad_RV * min(1.0, MAX_NORM / norm) if step.way.clip else grad_RV
        return relative_error([moved_RV], [two_steps(step.way.rule, clipped_RV, _rate(step.way, grad_RV, norm))])

    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[Way(way.name, functools.partial(build, way)) for way in ways],
        error=error,
        tolerance=TOLERANCE[dtype],
        baselines=[DENSE, DENSE_UNCLIPPED] if timed else [DENSE],
        peers=[way.name for way in ways if way.learning == "peer"],
        rebuild=device.type != "cpu",
        timed=timed,
        memory=not timed,
        held=first.table_NV.nbytes,
        values=first.table_NV.numel(),
    )


def _another(first: Reads, sizes: Lookup) -> Reads:
    weights_TK, upstream_TV = torch.rand_like(first.weights_TK), torch.randn_like(first.upstream_TV)
    return first._replace(ids_TK=draw_ids(sizes, first.table_NV.device), weights_TK=weights_TK, upstream_TV=upstream_TV)


def _gradient(reads: Reads) -> tuple[Tensor, float]:
    """Returns the gradient of the sampled rows and the norm of the whole gradient, in float64."""
    rows_U, place_TK = torch.unique(reads.ids_TK, return_inverse=True)
    grads_UV = torch.zeros(len(rows_U), reads.table_NV.shape[1], dtype=torch.float64, device=rows_U.device)
    # In chunks: all products at once would take T * K * V float64 values.
    for place_CK, weights_CK, upstream_CV in zip(
        place_TK.split(64), reads.weights_TK.split(64), reads.upstream_TV.split(64), strict=True
    ):
        parts_CKV = weights_CK.double().unsqueeze(-1) * upstream_CV.double().unsqueeze(1)
        grads_UV.index_add_(0, place_CK.flatten(), parts_CKV.flatten(0, 1))
    return reads.row_gradients(), grads_UV.norm().item()


def _rate(way: StepWay, grad_RV: Tensor, norm: float) -> float:
    """Returns the learning rate; for plain gradient descent one that moves rows about as far as the other rules do."""
    if way.rule != "sgd":
        return LR
    return LR / (grad_RV.square().mean().sqrt().item() * min(1.0, MAX_NORM / norm))


def two_steps(rule: str, grad_RV: Tensor, lr: float) -> Tensor:
    """Returns the displacement of rows after two steps of one gradient, starting from zero moments, in float64."""
    moved_RV = torch.zeros_like(grad_RV)
    mean_RV, square_RV, sum_R1 = torch.zeros_like(grad_RV), torch.zeros_like(grad_RV), torch.zeros_like(grad_RV[:, :1])
    beta1, beta2 = BETAS.get(rule, BETAS["adam"])
    for step in (1, 2):
        mean_RV = beta1 * mean_RV + (1 - beta1) * grad_RV
        square_RV = beta2 * square_RV + (1 - beta2) * grad_RV**2
        sum_R1 = sum_R1 + grad_RV.square().mean(dim=1, keepdim=True)
        if rule == "sgd":
            moved_RV -= lr * grad_RV
        elif rule == "row_adagrad":
            moved_RV -= lr * grad_RV / (sum_R1.sqrt() + EPS)
        else:
            moved_RV -= lr * mean_RV / (1 - beta1**step) / ((square_RV / (1 - beta2**step)).sqrt() + EPS)
    return moved_RV
