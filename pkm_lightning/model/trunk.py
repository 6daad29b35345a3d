"""The contract between the rest of the package and a trunk: the embedding, layers, norm and unembedding around plugins.

`Transformer` is one, and whatever `model._target_` names must be another: the builder, the LightningModule, planning,
generation and reports call nothing but the members below.

A trunk with a `_target_` may have a class method `complete(config)`. It returns the whole configuration with what the
trunk's files say under `model` (`dim`, `n_layers` and `vocab_size` at least), before anything else is checked. If its
layers take plugins, its constructor takes `plugins`, by layer and `placement.mode`, and `tables`, where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pkm_lightning.memory import ValueTable
    from pkm_lightning.model.cache import DecodingCache

#: Traces of the plugins by layer number; see `FFNOutput.trace`.
Traces = dict[int, "dict[str, Tensor]"]


@dataclass
class ModelOutput:
    """The output of one forward: the last hidden state after the final norm, and the reports of the plugins.

    `aux_losses` are sums over layers, `metrics` means over layers; `step_stats` and `traces` are by layer number.

    Example: that of `Transformer`; `hidden_BTD` goes through its `unembed`.
    """

    hidden_BTD: Tensor
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    step_stats: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    traces: Traces = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class PartCost(NamedTuple):
    """The cost per token of a trunk's own parts: all but plugins, tables, token embedding and unembedding.

    Attributes:
        active_params: parameters that enter the arithmetic of one token's output.
        flops: forward FLOPs of one token.
    """

    active_params: int
    flops: int


class Trunk(Protocol):
    """A language model without its loss, whose FFNs are plugins or parts of its own."""

    #: False makes the next forwards keep all activations; see `pkm_lightning.capacity.activations`.
    activation_checkpointing: bool

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, W rows of D."""

    @property
    def is_tied(self) -> bool:
        """Whether the model unembeds with the embedding's matrix."""

    @property
    def tied_unembedding(self) -> nn.Module | None:
        """A module with a `weight` that is registered elsewhere, which engines must gather around its forward."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers: units of compilation, sharding and recomputation. Each takes hidden states as its first input."""

    @property
    def tables(self) -> nn.ModuleList:
        """The value tables that the trunk owns, each once."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every parameter once; any `nn.Module` has this."""

    @property
    def value_tables(self) -> list[ValueTable]:
        """Those, and the tables that plugins own themselves."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, besides the end token of the tokenizer."""

    @property
    def is_cacheable(self) -> bool:
        """Whether a cache is all that a new token needs of earlier ones."""

    def plugins(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Yields layer, name within the layer and module of each FFN plugin."""

    def init_weights(self, seed: int, *, replaced: bool = False) -> None:
        """Gives every weight its value before training.

        Args:
            seed: of what is drawn at random.
            replaced: a checkpoint is about to replace all of them, so that files need not be read.
        """

    def compile_blocks(self) -> None:
        """Compiles each block in place, which leaves parameter names unchanged."""

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        doc_ids_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        observe: bool = False,
        cache: DecodingCache | None = None,
    ) -> ModelOutput:
        """Returns hidden states after the final norm; see `Transformer.forward`."""

    def unembed(self, hidden_MD: Tensor) -> Tensor:
        """Returns logits for any selection of hidden states, (..., D) -> (..., W)."""

    def new_cache(self, batch: int, capacity: int) -> DecodingCache:
        """Returns an empty cache for `batch` sequences of at most `capacity` tokens, padding included."""

    def own_cost(self, context: int) -> PartCost:
        """Returns the cost of the parts that are no plugins, with `context` tokens in attention."""
