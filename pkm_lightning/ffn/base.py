"""The contract between the transformer and an FFN plugin: inputs, outputs and cost.

A plugin is any `nn.Module` with `forward(x_BTD, context) -> FFNOutput`; it need not inherit from anything. The builder
passes `dim`, `layer`, `n_layers`, `vocab_size`, `table`, `table_number` (0, 1, ... where each layer has a table of its
own, 0 where all share one) and `table_reader` (0, 1, ... of the layers that read the same table) to a constructor that
has parameters of these names; the YAML gives everything else.

Optional members:

- `table_spec(**arguments) -> TableSpec`, a class method that a plugin with a `table` must have. It is called before
  construction, once per table, with `dim`, `n_layers`, `vocab_size`, `table_number`, `table_readers` (the number of
  layers that will read this table) and the arguments of the YAML.
- `reset_parameters()` draws the plugin's own parameters and buffers anew.
- `cost() -> FFNCost`; reports mark the cost of a plugin without it as unknown.
- `zero_output()` makes the output exactly zero for every input, with gradients that teach it: where the plugin sums
  rows of a table that learns, those rows are set to zero, so that rows alone can be taught afterwards; elsewhere (rows
  that are frozen, mapped or begin with those of a file, and plugins without a table) the last matrix is. A plugin that
  stands beside a pretrained FFN starts so. It is called after weights and initial rows are loaded, and each rank
  changes its part of a table.
- `match_stream(input_rms, stream_length)` multiplies initial matrices, where those were drawn for inputs of RMS 1 and a
  residual stream of length 1, as the package's own models begin with. A plugin that starts at zero beside a pretrained
  FFN gets what was measured there, in powers of two.
- `reads() -> list[TableRead]`, for figures of traffic and for the staging of reads.
- `slots() -> list[Slots]`, for figures of usage.
- `after_step(stats)` acts once per optimizer step.
- `bind_tokenizer(tokenizer)` takes what the plugin needs of the tokenizer of the data (None: there is none), and
  refuses one that it cannot work with. It is called once on a new model, before training; what is taken belongs in
  persistent buffers, so that checkpoints carry it.
- `complete(ffn, table, dim=, places=) -> (ffn, table)`, a class method, fills in both groups of the configuration with
  what files say; `places` are the numbers of the plugin's layers. What it has filled in it leaves alone.
- `load_pretrained()` gives a new plugin weights from files, before training.
- `row_ids(context) -> list[tuple[ValueTable, Tensor]]`, where ids of rows follow from tokens alone: the reads of the
  next micro-batch may then be fetched ahead. A forward that takes its ids from `context.ids_ahead` spares a GPU the
  comparison by which other reads of these rows are recognised.
- `causal_in_training: bool`, False where a token's output depends on later tokens in training; missing means True.
- `position_wise: bool`, True where at evaluation a token's output depends on that token alone. Answers are then
  written with a cache, which hands the plugin new tokens only; missing means False, and each token repeats the forward.
- `uses_past: bool`, True where the plugin does depend on earlier tokens, but takes them from `context.past`.
- `normalises_input: bool`, True where the plugin, placed before or after a block, takes the residual stream as it is;
  missing means False, and it gets the stream normalised, as it does in the place of an FFN.
- `buffer_keys: tuple[str, ...]`, arguments of the YAML whose values lie in persistent buffers. Weights of a checkpoint
  decide them, and a new run from these refuses other values.
- `parameter_roles: dict[str, str]`, from own parameters' names to `table`, `key`, `norm`, `bias`, `embedding` or
  `matrix`.

Any module within a plugin may have `diagnostics(output, *inputs) -> dict[str, Tensor]`: named scalars, computed now and
then from the inputs and the output of its forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkm_lightning.memory import ValueTable


class Past(Protocol):
    """What one plugin of one layer remembers of the tokens of a cache. Letters: X any further dimensions."""

    def extend(self, name: str, new_BTX: Tensor, before: int, fill: float) -> Tensor:
        """Enters T new positions under `name`; returns the `before` positions in front of them and the new ones.

        Padding on the left is entered like any token, as the plugin wants it to be seen later.

        Args:
            name: of what is remembered; a plugin may remember several things.
            new_BTX: the new positions.
            before: earlier positions in the result.
            fill: the value of positions in front of the first one.
        """

    def part(self, name: str) -> Past:
        """Returns the past of a plugin within this one."""


class FFNContext(NamedTuple):
    """Facts about the tokens of a forward that their hidden states do not hold.

    Example:
        >>> import torch
        >>> FFNContext(torch.zeros(2, 5, dtype=torch.int64), valid_BT=torch.ones(2, 5, dtype=torch.bool)).observe
        False
    """

    #: Token ids, (B, T) int64, for memories that are addressed by token.
    input_ids_BT: Tensor
    #: False at padding, (B, T) bool, or None where all tokens are real. Padding enters no statistics and no counts.
    valid_BT: Tensor | None = None
    #: Document number of each token, (B, T) int64, or None for one document per sequence.
    doc_ids_BT: Tensor | None = None
    #: True while a callback observes: the plugin fills `FFNOutput.trace`.
    observe: bool = False
    #: The tokens before these, where a cache holds them; None: these are whole sequences.
    past: Past | None = None
    #: The token embeddings, with which the residual stream begins, (B, T, D), or None where a caller has none.
    embedding_BTD: Tensor | None = None

    def ids_ahead(self, plugin: nn.Module, table: ValueTable) -> list[Tensor] | None:
        """Returns the ids (T, K) of `plugin.row_ids` for this table, where a prefetch has computed them; else None."""
        if self.past is not None:
            return None
        return table.ids_ahead(plugin, (self.input_ids_BT, self.valid_BT, self.doc_ids_BT))


#: The context of a call without one, `layer(x)`: whole sequences without padding, of tokens whose ids are not known.
#: Only plugins that are addressed by tokens read the ids, and they refuse it (`check_tokens`).
NO_CONTEXT = FFNContext(cast("Tensor", None))


class FFNOutput(NamedTuple):
    """The output of a plugin; only `y_BTD` is required. Plain tensors and dicts, so that blocks compile.

    Example: `docs/python.md`.
    """

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


_Record = TypeVar("_Record", FFNContext, FFNOutput)


def replaced(record: _Record, **fields: Any) -> _Record:
    """Returns `record` with other `fields`, as its `_replace` does, which torch 2.11 cannot compile."""
    return type(record)(**{**record._asdict(), **fields})


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """The value tables that a plugin requests from the model.

    Args:
        rows, dim: shape of each table, N and V.
        count: number of tables; the constructor's `table` is one `ValueTable` for 1, else a list of them.
        std: standard deviation of the normal distribution of the initial rows; None takes dim**-0.5.
        trainable: False leaves the rows as they were drawn.
        slices: equal parts of a row that are read separately; see `ValueTable`.

    Example: `examples/own_ffn.py`.
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

    Example:
        >>> from pkm_lightning import Dense
        >>> Dense(dim=8, hidden_dim=16).cost().flops
        768
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
        groups: sums per read where the table is called with groups, else 0 (one sum); for `gather` equal to `ids`.
        dot: the call is `table.dot`, else a weighted sum.
        gather: the call is `table.gather`, which exchanges and stages ids without weights.

    Example:
        >>> from pkm_lightning import MemoryPlus
        >>> MemoryPlus(dim=8, n_keys=16, heads=2, knn=4).reads()[0].ids
        8
    """

    table: ValueTable
    ids: int
    reads: int = 1
    groups: int = 0
    dot: bool = False
    gather: bool = False


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The meaning of the ids in a trace, for figures of usage. A slot is a row of a table, or an expert.

    Args:
        name: prefix in the trace: `slot` for `trace["slot_ids"]`, `expert`, or any other.
        count: number of slots N; ids are 0 to N - 1.
        tables: the tables whose first N rows the slots are; layers with the same tables share their slots.
        padding: rows behind these, which no id reads and no figure counts.
        n_keys: sub-keys per half S where slot i * S + j has the sub-keys i and j, else None.

    Example:
        >>> from pkm_lightning import MemoryPlus
        >>> MemoryPlus(dim=8, n_keys=16).slots()[0].count
        256
    """

    name: str
    count: int
    tables: tuple[ValueTable, ...] = ()
    n_keys: int | None = None
    padding: int = 0


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
class HasRowIds(Protocol):
    """A plugin whose ids follow from tokens alone."""

    def row_ids(self, context: FFNContext) -> list[tuple[ValueTable, Tensor]]:
        """Returns the tables and ids (T, K) of the reads of a forward, in their order."""


@runtime_checkable
class UsesTokenizer(Protocol):
    """A plugin that depends on the tokenizer of the data."""

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Takes what it needs of `tokenizer`, a `pkm_lightning.data.base.TextCodec`; None: the data have none."""


@runtime_checkable
class HasPretrained(Protocol):
    """A plugin that begins with weights from files."""

    def load_pretrained(self) -> None:
        """Reads them. Called on every rank, once on a new model, and not where weights of a checkpoint follow."""


@runtime_checkable
class HasZeroOutput(Protocol):
    """A plugin whose output can start at zero, so that a model which gets it computes what it computed before."""

    def zero_output(self) -> None:
        """Makes the output zero for every input; `zero_rows` does it for a plugin that sums rows.

        Raises:
            ConfigError: this plugin, with these options, cannot learn from there.
        """


@runtime_checkable
class HasStreamScale(Protocol):
    """A plugin that can be initialised for the stream of another model."""

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Multiplies matrices that were drawn for inputs of RMS 1 and a stream of length 1; a zero output stays zero.

        Args:
            input_rms: of the plugin's input, per token.
            stream_length: Euclidean length of the residual stream that enters the layer, per token.
        """


@runtime_checkable
class HasAfterStep(Protocol):
    """A plugin that uses its own statistics once per optimizer step, after the update of the weights."""

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Handles `stats`, the sum of `FFNOutput.step_stats` over ranks and micro-batches."""
