"""The contract between the transformer and an FFN plugin: inputs, outputs and cost.

A plugin is any `nn.Module` with `forward(x_BTD, context) -> FFNOutput`; it need not inherit from anything. The builder
passes `dim`, `layer`, `n_layers` and `table` to a constructor that has parameters of these names; the YAML gives
everything else.

Optional members:

- `table_spec(**arguments) -> TableSpec`, a class method that a plugin with a `table` must have. It is called before
  construction with `dim`, `n_layers` and the arguments of the YAML.
- `reset_parameters()` draws the plugin's own parameters and buffers anew.
- `cost() -> FFNCost`; reports mark the cost of a plugin without it as unknown.
- `reads() -> list[TableRead]`, for figures of traffic and for the staging of reads.
- `slots() -> list[Slots]`, for figures of usage.
- `after_step(stats)` acts once per optimizer step.
- `causal_in_training: bool`, False where a token's output depends on later tokens in training; missing means True.
- `position_wise: bool`, True where at evaluation a token's output depends on that token alone. Answers are then
  written with a cache, which hands the plugin new tokens only; missing means False, and each token repeats the forward.
- `parameter_roles: dict[str, str]`, from own parameters' names to `table`, `norm`, `bias`, `embedding` or `matrix`.

Any module within a plugin may have `diagnostics(output, *inputs) -> dict[str, Tensor]`: named scalars, computed now and
then from the inputs and the output of its forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from pkm_lightning.memory import ValueTable


class FFNContext(NamedTuple):
    """Facts about the tokens of a forward that their hidden states do not hold."""

    #: Token ids, (B, T) int64, for memories that are addressed by token.
    input_ids_BT: Tensor
    #: False at padding, (B, T) bool, or None where all tokens are real. Padding enters no statistics and no counts.
    valid_BT: Tensor | None = None
    #: Document number of each token, (B, T) int64, or None for one document per sequence.
    doc_ids_BT: Tensor | None = None
    #: True while a callback observes: the plugin fills `FFNOutput.trace`.
    observe: bool = False


class FFNOutput(NamedTuple):
    """The output of a plugin; only `y_BTD` is required. Plain tensors and dicts, so that blocks compile."""

    y_BTD: Tensor
    #: Named scalars, already weighted. Each is a mean over the real tokens of this rank's micro-batch (or of all ranks,
    #: where its statistics are those of all). They are added to the loss: summed over layers, averaged over ranks by
    #: real tokens and over micro-batches by targets.
    aux_losses: dict[str, Tensor] = {}  # noqa: RUF012 - a default of a NamedTuple, which no code writes to
    #: What was read or routed, detached, on the device; empty unless `context.observe`. The entries counted for each
    #: `Slots` are `NAME_ids` and `NAME_weights` of shape (B, T, heads, K) or (B, T, K), or `NAME_chosen` (bool) and
    #: `NAME_weights` of shape (B, T, N).
    trace: dict[str, Tensor] = {}  # noqa: RUF012
    #: Summable statistics of this micro-batch; `after_step` gets their sum over micro-batches and ranks. They leave
    #: through the return value, so that a forward which activation checkpointing recomputes cannot count twice.
    step_stats: dict[str, Tensor] = {}  # noqa: RUF012
    #: Added to the residual stream `placement.write_after` layers later instead of in this layer.
    deferred_BTD: Tensor | None = None
    #: Named detached scalars, each a mean over the real tokens of the rank's micro-batch; logged as `train/NAME`, the
    #: mean over layers.
    metrics: dict[str, Tensor] = {}  # noqa: RUF012


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The value tables that a plugin requests from the model.

    Args:
        rows, dim: shape of each table, N and V.
        count: number of tables; the constructor's `table` is one `ValueTable` for 1, else a list of them.
        std: standard deviation of the normal distribution of the initial rows; None takes dim**-0.5.
        trainable: False leaves the rows as they were drawn.
        slices: equal parts of a row that are read separately; see `ValueTable`.
    """

    rows: int
    dim: int
    count: int = 1
    std: float | None = None
    trainable: bool = True
    slices: int = 1


# Costs are plain numbers from formulas: they must be known on the meta device, before anything runs.
@dataclass(frozen=True, kw_only=True)
class FFNCost:
    """The cost of one layer. Multiply and add are two FLOPs; comparisons and element-wise operations count none.

    Args:
        params: parameters of the plugin itself, without the value table.
        table_params: parameters of the value tables that it reads (a shared table counts once in the model's sum).
        active_params: parameters that enter the arithmetic of one token's output, table rows included.
        flops: forward FLOPs per token at evaluation.
        train_flops: forward FLOPs per token in training, where they are more; None: the same. Backward is twice that.
        lookup_bytes: bytes of table rows (or experts) that one token gathers in forward and shares with no other token.
    """

    params: int
    table_params: int = 0
    active_params: int
    flops: int
    train_flops: int | None = None
    lookup_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TableRead:
    """One call of a value table in a training forward, for figures of memory and communication.

    Args:
        table: the table that is called.
        ids: ids per read K; an id is the number of a row, or of a slice where the table has slices.
        reads: reads per token.
        groups: sums per read where the table is called with groups, else 0 (one sum).
        dot: the call is `table.dot`, else a weighted sum.
    """

    table: ValueTable
    ids: int
    reads: int = 1
    groups: int = 0
    dot: bool = False


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The meaning of the ids in a trace, for figures of usage. A slot is a row of a table, or an expert.

    Args:
        name: prefix in the trace: `slot` for `trace["slot_ids"]`, `expert`, or any other.
        count: number of slots N; ids are 0 to N - 1.
        tables: the tables whose rows the slots are; layers with the same tables share their slots.
        n_keys: sub-keys per half S where slot i * S + j has the sub-keys i and j, else None.
    """

    name: str
    count: int
    tables: tuple[ValueTable, ...] = ()
    n_keys: int | None = None


@runtime_checkable
class HasSlots(Protocol):
    """A plugin whose traces can be counted; without it no usage is reported."""

    def slots(self) -> list[Slots]:
        """Returns the slots of each kind in the trace."""


@runtime_checkable
class HasReads(Protocol):
    """A plugin that describes its table reads; without it traffic and staged reads are unknown."""

    def reads(self) -> list[TableRead]:
        """Returns the table calls of one training forward, in any order."""


@runtime_checkable
class HasCost(Protocol):
    """A plugin that computes its cost; one without it still trains, and reports mark the figure as missing."""

    def cost(self) -> FFNCost:
        """Returns the cost of this layer."""


@runtime_checkable
class HasAfterStep(Protocol):
    """A plugin that uses its own statistics once per optimizer step, after the update of the weights."""

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Handles `stats`, the sum of `FFNOutput.step_stats` over ranks and micro-batches."""
