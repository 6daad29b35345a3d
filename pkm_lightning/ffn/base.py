"""The contract between the transformer and an FFN plugin: what goes in, what comes out, what it costs.

Letters: B sequences, T tokens, D model dimension, N slots.

A plugin is any `nn.Module` with `forward(x_BTD, context) -> FFNOutput`; it need not inherit from anything. The builder
passes `dim`, `layer`, `n_layers` and `table` to a constructor that asks for them; the YAML gives everything else.
Optional members: `cost() -> FFNCost`, `reads() -> list[TableRead]`, `slots() -> list[Slots]`, `reset_parameters()`,
`after_step(stats)`, the class method `table_spec(**arguments) -> TableSpec` (asked for before construction when the
constructor takes a `table`; the arguments are `dim`, `n_layers` and the YAML's), and `parameter_roles`, a dict from own
parameter names to roles (`table`, `norm`, `bias`, `embedding`, `matrix`). Any module in it may have
`diagnostics(output, *inputs) -> dict[str, Tensor]`: scalars to look at now and then, of the inputs and the output of
its forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from pkm_lightning.memory import ValueTable


class FFNContext(NamedTuple):
    """What a plugin may know of the tokens besides their hidden states."""

    #: Token ids, (B, T) int64: memories that are addressed by token use them.
    input_ids_BT: Tensor
    #: False at padding, (B, T) bool, or None where all tokens are real: padding enters no statistics and no counts.
    valid_BT: Tensor | None = None
    #: Document number of each token, (B, T) int64, or None for one document a row.
    doc_ids_BT: Tensor | None = None
    #: Somebody watches: fill `FFNOutput.trace`.
    observe: bool = False


class FFNOutput(NamedTuple):
    """What a plugin returns; only `y_BTD` is required. Plain tensors and dicts, so that blocks compile."""

    y_BTD: Tensor
    #: Named scalars, already weighted, each a mean over the real tokens of the micro-batch of this rank (or of all
    #: ranks, where its statistics are those of all); added to the loss,
    #: summed over layers, averaged over ranks by their real tokens and over micro-batches by their targets.
    aux_losses: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple default; nobody writes to it
    #: What was read or routed, detached, on the device; empty unless `context.observe`. For each `Slots` are counted
    #: `NAME_ids` and `NAME_weights`, of shape (B, T, heads, K) or (B, T, K), or `NAME_chosen` (bool) and
    #: `NAME_weights`, of shape (B, T, N).
    trace: dict[str, Tensor] = {}  # noqa: RUF012
    #: Summable statistics of this micro-batch; `after_step` gets their sum over micro-batches and ranks. They leave
    #: through the return value, so a forward that activation checkpointing recomputes cannot count twice.
    step_stats: dict[str, Tensor] = {}  # noqa: RUF012
    #: Added to the residual stream `placement.write_after` layers later instead of here.
    deferred_BTD: Tensor | None = None
    #: Named detached scalars to look at, each a mean over the real tokens of the rank's micro-batch; logged as
    #: `train/NAME`, a mean over the layers.
    metrics: dict[str, Tensor] = {}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The value tables that a plugin asks the model for.

    Args:
        rows, dim: their common shape.
        count: how many; `table` is one `ValueTable` for 1, else a list of them.
        std: standard deviation of the normal distribution that rows start from; None takes dim**-0.5.
        trainable: False leaves the rows as they were drawn.
        slices: equal parts of a row that are read each for itself; see `ValueTable`.
    """

    rows: int
    dim: int
    count: int = 1
    std: float | None = None
    trainable: bool = True
    slices: int = 1


@dataclass(frozen=True, kw_only=True)
class FFNCost:
    """What one layer costs. Multiply and add count as two FLOPs; comparisons and element-wise work are left out.

    Args:
        params: parameters of the plugin itself, without the value table.
        table_params: parameters of the value table that it reads (a shared table counts once in the model's sum).
        active_params: parameters that one token's output depends on through arithmetic, table rows included.
        flops: forward FLOPs a token, at evaluation.
        train_flops: forward FLOPs a token in training, where it does more; None: the same. Backward counts twice that.
        lookup_bytes: bytes of table rows (or experts) that one token gathers in forward and no other token shares.
    """

    params: int
    table_params: int = 0
    active_params: int
    flops: int
    train_flops: int | None = None
    lookup_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TableRead:
    """One call of a value table in a forward in training, for figures of memory and communication.

    Args:
        table: the table that is called.
        ids: lines that a read names, K.
        reads: reads a token.
        groups: sums a read where it is called with groups, else 0 (one sum).
        dot: it is `table.dot`, else a weighted sum.
    """

    table: ValueTable
    ids: int
    reads: int = 1
    groups: int = 0
    dot: bool = False


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What the ids of a trace number, for figures of usage. A slot is a row of a table, or an expert.

    Args:
        name: that of the trace: `slot` for `trace["slot_ids"]`, `expert`, or any other.
        count: slots N; ids are 0 to N - 1.
        tables: the tables whose rows they are; layers with the same tables share their slots.
        n_keys: sub-keys a half S where the id of a slot is i * S + j, else None.
    """

    name: str
    count: int
    tables: tuple[ValueTable, ...] = ()
    n_keys: int | None = None


@runtime_checkable
class HasSlots(Protocol):
    """A plugin whose traces can be counted; of one that does not say this, no usage is known."""

    def slots(self) -> list[Slots]:
        """What its traces number."""


@runtime_checkable
class HasReads(Protocol):
    """A plugin that says how it reads tables; of one that does not, traffic and staged reads are unknown."""

    def reads(self) -> list[TableRead]:
        """The calls of a forward, in any order."""


@runtime_checkable
class HasCost(Protocol):
    """A plugin that states its cost; one that does not still trains, and reports say that the figure is missing."""

    def cost(self) -> FFNCost:
        """The cost of this layer."""


@runtime_checkable
class HasAfterStep(Protocol):
    """A plugin that acts on its own statistics once per optimizer step, after the update of the weights."""

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """`stats` is the sum of `FFNOutput.step_stats` over ranks and micro-batches."""
