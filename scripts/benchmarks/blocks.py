"""One training step of an FFN alone: forward, backward, update, for SwiGLU, a mixture of experts and Memory+.

On the CPU all have equal forward FLOPs per token; on a GPU Memory+ has the paper's shape, values as wide as the model.

"byte floor, RULE" is what a memory layer of these FLOPs cannot be faster than if it moves bytes as a copy does: a step
of the SwiGLU, and then a copy of as many bytes as the table's part of the step reads and writes: the rows of all reads
forward and once more for the gradients of the weights; rows and states of touched rows, read and written.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.case import Case, Way
from benchmarks.inputs import table, value_table
from pkm_lightning.ffn import FFNContext
from pkm_lightning.ffn.dense import Dense
from pkm_lightning.ffn.memory_plus import MemoryPlus
from pkm_lightning.ffn.moe import MoE
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable

LR = 1e-4
# Values of fp32 state per value of a row, by the rule of the row optimizer; states per row are left out.
STATES = {"lazy_adam": 2, "row_adagrad": 0}
#: Bytes that a copy reads: more than caches hold.
COPIED_BYTES = 2**27
CHECKED = 256
# In bf16 queries are rounded, which changes the slots at the border of the top-k against float64.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class Block(NamedTuple):
    """Sizes of an FFN layer.

    Args:
        tokens: T.
        dim: model dimension D.
        hidden: hidden dimension of the SwiGLU.
        n_keys: sub-keys per half of Memory+; its 4 heads read 32 rows each.
        key_dim: dimension of both half keys together.
        matched: give Memory+ values so wide that forward FLOPs equal the SwiGLU's; otherwise as wide as the model.
    """

    tokens: int
    dim: int
    hidden: int
    n_keys: int
    key_dim: int
    matched: bool

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.dim} hidden={self.hidden}"


def memory_plus(block: Block, weight_NV: Tensor, learning: str, device: str = "auto") -> MemoryPlus:
    """Builds the layer around existing rows."""
    return memory_on(block, value_table(weight_NV, learning, device))


def memory_on(block: Block, table: ValueTable) -> MemoryPlus:
    """Builds the layer on a table, which several layers may share."""
    return MemoryPlus(
        dim=block.dim,
        table=table,
        n_keys=block.n_keys,
        heads=4,
        knn=32 if block.n_keys >= 32 else 4,
        key_dim=block.key_dim,
        value_dim=table.dim,
        qk_norm=True,
    )


def mixture(block: Block, n_layers: int, n_experts: int, top_k: int) -> MoE:
    """Builds a mixture of SwiGLUs of the block's width, balanced by a loss."""
    return MoE(
        dim=block.dim,
        n_layers=n_layers,
        dense_hidden_dim=block.hidden,
        hidden_dim=None,
        n_experts=n_experts,
        top_k=top_k,
        shared_experts=0,
        score="softmax",
        select="before",
        renormalise=False,
        routed_scale=1.0,
        balancing="loss",
        balance_loss=0.01,
        bias_rate=0.0,
        z_loss=0.001,
        sequence_balance_loss=0.0,
    )


def value_dim(block: Block) -> int:
    """Returns the values per row."""
    if not block.matched:
        return block.dim
    # FLOPs are linear in the width: two of them give slope and offset.
    with torch.device("meta"):
        costs = [memory_plus(block, torch.empty(block.n_keys**2, width), "rows").cost().flops for width in (8, 16)]
    per_value = (costs[1] - costs[0]) // 8
    return max(8, (6 * block.dim * block.hidden - costs[0]) // per_value // 8 * 8 + 8)


class ByteFloor:
    """Step of the dense layer, and a copy of the bytes that a memory layer moves."""

    def __init__(self, dense: BlockStep, moved: int) -> None:
        self.dense, self.moved = dense, moved
        self.source, self.target = torch.ones(2, COPIED_BYTES, dtype=torch.uint8, device=dense.x_BTD.device)

    def __call__(self) -> None:
        self.dense()
        # A copy moves its bytes twice.
        for start in range(0, self.moved // 2, COPIED_BYTES):
            length = min(COPIED_BYTES, self.moved // 2 - start)
            self.target[:length].copy_(self.source[:length])

    def error(self) -> float:
        """Returns the error of the dense layer."""
        return self.dense.error()


class BlockStep:
    """Training step of a module, as a callable."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, x_BTD: Tensor, upstream_BTD: Tensor) -> None:
        self.module, self.optimizer = module, optimizer
        self.x_BTD, self.upstream_BTD = x_BTD, upstream_BTD

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        output = self.module(self.x_BTD, context_of(self.x_BTD))
        loss = (output.y_BTD * self.upstream_BTD).sum() + sum(output.aux_losses.values())
        loss.backward()
        self.optimizer.step()

    def error(self) -> float:
        """Returns the relative error of the forward pass."""
        # A few tokens are enough: the float64 copy is slow.
        x_BTD = self.x_BTD[:1, :CHECKED]
        with torch.no_grad():
            return forward_error(self.module(x_BTD, context_of(x_BTD)).y_BTD, self.module, x_BTD)


def block_case(block: Block, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case: a step of each FFN on the same tokens."""
    weight_NV = table(block.n_keys**2, value_dim(block), dtype, device)
    x_BTD, upstream_BTD = (torch.randn(8, block.tokens // 8, block.dim, device=device).to(dtype) for _ in range(2))

    def step(make: Callable[[], nn.Module], rule: str | None = None) -> BlockStep:
        module = make().to(device, dtype)
        return BlockStep(module, _optimizer(module, rule), x_BTD, upstream_BTD)

    def way(name: str, make: Callable[[], nn.Module], rule: str | None = None) -> Way:
        return Way(name, functools.partial(step, make, rule))

    def floor(rule: str) -> Way:
        def build() -> ByteFloor:
            return ByteFloor(step(dense), moved_bytes(memory(), x_BTD, rule))

        return Way(f"byte floor, {rule}", build)

    memory = functools.partial(memory_plus, block, weight_NV, "rows")
    dense = functools.partial(Dense, dim=block.dim, n_layers=2, hidden_dim=block.hidden)
    return Case(
        sizes=f"{block} N={len(weight_NV)} V={weight_NV.shape[1]} {dtype}".replace("torch.", ""),
        ways=[
            way("SwiGLU", dense),
            way("MoE, 2 of 8 experts", functools.partial(mixture, block, n_layers=2, n_experts=8, top_k=2)),
            way("Memory+, lazy_adam", memory, "lazy_adam"),
            way("Memory+, row_adagrad", memory, "row_adagrad"),
            *(floor(rule) for rule in STATES if block.matched),
        ],
        error=lambda step: step.error(),
        tolerance=TOLERANCE[dtype],
        baselines=["SwiGLU", *(f"byte floor, {rule}" for rule in STATES if block.matched)],
        tokens=block.tokens,
        memory=False,
    )


@torch.no_grad()
def moved_bytes(layer: MemoryPlus, x_BTD: Tensor, rule: str) -> int:
    """Returns the bytes of table and states that a step of these tokens reads and writes."""
    layer = layer.to(x_BTD.device, x_BTD.dtype)
    ids_TC = layer.addressing(x_BTD.flatten(0, 1), None).ids_TC
    row_bytes, values = layer.values.table.weight.element_size() * layer.values.table.dim, layer.values.table.dim
    return 2 * ids_TC.numel() * row_bytes + ids_TC.unique().numel() * 2 * (row_bytes + STATES[rule] * 4 * values)


def _optimizer(module: nn.Module, rule: str | None) -> Optimizer:
    # A table that learns by rows requires no gradient: a row rule moves it.
    dense = AdamW([p for p in module.parameters() if p.requires_grad], lr=LR, fused=True)
    if rule is None:
        return dense
    assert isinstance(module, MemoryPlus)
    return TableOptimizer(dense, {"table": module.values.table}, rows=RowOptimizer(rule=rule), lr=LR)


def context_of(x_BTD: Tensor) -> FFNContext:
    """Returns a context with zero ids, for FFNs that do not read them."""
    return FFNContext(input_ids_BT=torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device))


@torch.no_grad()
def forward_error(y_BTD: Tensor, module: nn.Module, x_BTD: Tensor) -> float:
    """Returns the median over tokens of the relative error of an output against a copy of the module in float64.

    The median ignores single tokens for which float64 decides a near tie otherwise.
    """
    wide = copy.deepcopy(module).double()
    expected_BTD = wide(x_BTD.double(), context_of(x_BTD)).y_BTD
    error_BT = (y_BTD - expected_BTD).norm(dim=-1) / expected_BTD.norm(dim=-1)
    return error_BT.median().item()
