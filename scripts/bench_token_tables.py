"""A training step of a table that is addressed by token ids: rows read one by one, backward, clipping, update.

    python scripts/bench_token_tables.py [--device cuda] [--only 160] [--out]

The contenders are torch's own: `nn.Embedding` with its dense gradient, `clip_grad_norm_` and fused AdamW, and
`nn.Embedding(sparse=True)` with SparseAdam, which torch cannot clip. Lazy Adam and SparseAdam are other algorithms than
AdamW: rows that are not read do not move. A second set of rows shows where the time of lazy Adam goes: each way does
one part more of the step than the one before it.

`THP_MEM_ALLOC_ENABLE=1` in the environment lets torch put the table in huge pages, which speeds up all ways.

Letters: R sampled rows, L = T * K reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from benchmarks.case import Case, Options, Row, Way, relative_error
from benchmarks.inputs import Lookup, draw_ids, table, value_table
from benchmarks.protocol import benchmark
from benchmarks.steps import BETAS, EPS, LR, MAX_NORM, TOLERANCE, Moments, two_steps
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam

from pkm_lightning.memory import RowOptimizer, TableOptimizer, clip_tables

EMBEDDING = "nn.Embedding, clip_grad_norm_, AdamW"
BATCHES = 4
WIDTHS = (16, 32, 64, 160)


class Batch(NamedTuple):
    """Ids, and the gradients of the rows that they read."""

    ids_TK: Tensor
    upstream_TKV: Tensor


class EmbeddingStep:
    """A step of torch's embedding; a call takes the next batch."""

    def __init__(self, weight_NV: Tensor, batches: list[Batch], moments: Moments, sparse: bool) -> None:
        self.batches, self.calls, self.sparse = batches, 0, sparse
        self.embedding = nn.Embedding(*weight_NV.shape, _weight=weight_NV, sparse=sparse)
        weight = self.embedding.weight
        if sparse:
            self.optimizer: Optimizer = SparseAdam([weight], lr=LR, betas=BETAS["adam"], eps=EPS)
        else:
            self.optimizer = AdamW([weight], lr=LR, betas=BETAS["adam"], eps=EPS, weight_decay=0.0, fused=True)
        # The state that the optimizer would create in its first step; it must exist to be shared.
        state = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        moments.share(state)
        self.optimizer.state[weight] = {"step": 0 if sparse else torch.zeros((), device=weight.device), **state}

    def __call__(self) -> None:
        self.step(self.batches[self.calls % len(self.batches)])
        self.calls += 1

    def step(self, batch: Batch) -> None:
        """Runs forward, backward, clipping and update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.embedding(batch.ids_TK).backward(batch.upstream_TKV)
        if not self.sparse:
            nn.utils.clip_grad_norm_([self.embedding.weight], MAX_NORM)
        self.optimizer.step()


class RowsStep:
    """A step of the package's table, or its first `parts` parts: read, backward, norm, update."""

    def __init__(self, weight_NV: Tensor, batches: list[Batch], moments: Moments, rule: str, parts: int = 4) -> None:
        self.batches, self.calls, self.parts = batches, 0, parts
        self.table = value_table(weight_NV, "rows")
        # A TableOptimizer wraps the optimizer of all other parameters; here there are none, so it gets a dummy.
        rest = SGD([nn.Parameter(weight_NV.new_zeros(1))], lr=LR)
        rows = RowOptimizer(rule=rule, betas=BETAS["adam"], eps=EPS)
        self.optimizer = TableOptimizer(rest, {"table": self.table}, rows=rows, lr=LR)
        moments.share(self.optimizer.state[self.table.weight])

    def __call__(self) -> None:
        self.step(self.batches[self.calls % len(self.batches)])
        self.calls += 1

    def step(self, batch: Batch) -> None:
        """Runs the parts of the step."""
        self.optimizer.zero_grad()
        rows_TKV = self.table.gather(batch.ids_TK)
        if self.parts > 1:
            rows_TKV.backward(batch.upstream_TKV)
        if self.parts > 2:
            clip_tables([self.table], [], MAX_NORM)
        if self.parts > 3:
            self.optimizer.step()


Step = EmbeddingStep | RowsStep


def step_case(sizes: Lookup, device: torch.device, dtype: torch.dtype, *, parts: bool) -> Case:
    """Builds the case: whole steps by every way, or the parts of a step of lazy Adam."""
    weight_NV = table(sizes.rows, sizes.dim, dtype, device)
    shape = sizes.tokens, sizes.reads, sizes.dim
    batches = [Batch(draw_ids(sizes, device), torch.randn(shape, device=device).to(dtype)) for _ in range(BATCHES)]
    moments = Moments(weight_NV)
    ids_L, upstream_LV = batches[0].ids_TK.flatten(), batches[0].upstream_TKV.flatten(0, 1)
    rows_R = torch.unique(ids_L[:: max(1, len(ids_L) // 61)]).long()

    @functools.cache
    def gradient() -> tuple[Tensor, float]:
        """Returns the gradient of the sampled rows and the norm of the whole gradient, in float64."""
        rows_U, place_L = torch.unique(ids_L.long(), return_inverse=True)
        grads_UV = torch.zeros(len(rows_U), sizes.dim, dtype=torch.float64, device=device)
        grads_UV.index_add_(0, place_L, upstream_LV.double())
        return grads_UV[torch.searchsorted(rows_U, rows_R)], grads_UV.norm().item()

    def error(rule: str, clips: bool, step: Step) -> float:
        before_RV = weight_NV[rows_R].double()
        # After one step Adam has moved rows by the gradient's sign, whatever its moments: a second step checks them.
        for _ in range(2):
            step.step(batches[0])
        moved_RV = weight_NV[rows_R].double() - before_RV
        grad_RV, norm = gradient()
        grad_RV = grad_RV * min(1.0, MAX_NORM / norm) if clips else grad_RV
        return relative_error([moved_RV], [two_steps(rule, grad_RV, LR)])

    makers: dict[str, Callable[[], Step]] = {
        EMBEDDING: lambda: EmbeddingStep(weight_NV, batches, moments, sparse=False),
        "sparse nn.Embedding, SparseAdam, no clip": lambda: EmbeddingStep(weight_NV, batches, moments, sparse=True),
        "rows lazy_adam": lambda: RowsStep(weight_NV, batches, moments, "lazy_adam"),
        "rows row_adagrad": lambda: RowsStep(weight_NV, batches, moments, "row_adagrad"),
    }
    if parts:
        names = ("read", "read, backward", "read, backward, norm", "read, backward, norm, update")
        makers = {
            name: functools.partial(RowsStep, weight_NV, batches, moments, "lazy_adam", number)
            for number, name in enumerate(names, 1)
        }

    def checked(step: Step) -> float:
        if isinstance(step, RowsStep) and step.parts < 4:
            return 0.0  # nothing is updated; the whole step is checked
        is_adagrad = isinstance(step, RowsStep) and step.optimizer.rows.rule.name == "row_adagrad"
        clips = not (isinstance(step, EmbeddingStep) and step.sparse)
        return error("row_adagrad" if is_adagrad else "adam", clips, step)

    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[Way(name, make) for name, make in makers.items()],
        error=checked,
        tolerance=TOLERANCE[dtype],
        baselines=[] if parts else [EMBEDDING],
        peers=[name for name in makers if "Embedding" in name],
        rebuild=device.type != "cpu",
        memory=False,
        tokens=sizes.tokens,
    )


def plan(options: Options) -> Iterator[Row]:
    """Yields whole steps at every width, then the parts of a step."""
    device, dtype = options.device, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    tokens, rows = (16, 256) if options.smoke else (16384, 2**22) if device.type == "cuda" else (1024, 2**20)
    for name, parts in (("token table step", False), ("parts of a step", True)):
        for dim in WIDTHS:
            sizes = Lookup(tokens, 16, rows, dim, "uniform")
            make = functools.partial(step_case, sizes, device, dtype, parts=parts)
            yield Row(f"{name}, V={dim}", make, make, sizes=str(sizes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the plan of the device."""
    benchmark("token-tables", __doc__, plan, arguments)


if __name__ == "__main__":
    main()
