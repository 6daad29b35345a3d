"""Models that receive plugins: one of this package, or one of transformers, of which nothing is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from pkm_lightning.build.ffn_reports import warn_of_reports
from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import TableReference, ValueTable, take_over_tables
from pkm_lightning.model import Transformer
from pkm_lightning.model.block import Block, stream_norm
from pkm_lightning.model.plugged_layer import PluggedLayer, PluginMLP, plug
from pkm_lightning.model.plugin_outputs import ParallelFFN

#: By `model_type` of transformers, the name of the list of layers in the decoder. Each layer has its FFN as `mlp`.
LAYERS_OF = {"gpt2": "h", "llama": "layers", "mistral": "layers", "qwen2": "layers", "qwen3": "layers"}


class Host(ABC):
    """A model that receives plugins.

    Attributes:
        model: as the user gave it.
        blocks: its layers.
        dim, vocab_size: its sizes.
        end_id: the end-of-text token; None if unknown.
    """

    #: Names of the list of tables in `model`, and of the FFN in a layer.
    tables: str
    ffn: str
    model: nn.Module
    blocks: nn.ModuleList
    dim: int
    vocab_size: int
    end_id: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Returns the host of a model.

        Raises:
            ConfigError: a model of another kind.
        """
        return TransformerHost(model) if isinstance(model, Transformer) else PretrainedHost(model)

    @abstractmethod
    def occupant(self, layer: int, mode: str) -> nn.Module | None:
        """Returns the plugin that leaves no room for another one in this mode, or None."""

    @abstractmethod
    def put(self, layer: int, plugin: nn.Module, mode: str) -> None:
        """Puts a plugin into a layer, whose mode, device and dtype it has."""

    def adapt(self, layer: int, plugin: nn.Module) -> None:
        """Moves a plugin and the tables that it registers to the layer's device and dtype."""
        weights = [*getattr(self.blocks[layer], self.ffn).parameters(), *self.blocks[layer].parameters()]
        # Quantised weights are integers.
        floats = (p for p in (*weights, *self.model.parameters()) if p.is_floating_point())
        if weights:
            plugin.to(weights[0].device, next(floats, weights[0]).dtype)

    def replace(
        self, plugins: Mapping[int, nn.Module], mode: str, tables: Sequence[ValueTable], *, freeze: bool = False
    ) -> None:
        """Puts plugins into layers, and registers their tables; `freeze` is for all that the model has so far.

        A table that nobody reads any more goes: a `TableOptimizer` would wait for its reads.
        """
        if freeze:
            self._freeze()
        before = _tables_of(self.model)
        for layer, plugin in plugins.items():
            self.put(layer, plugin.train(self.blocks[layer].training), mode)
        unread = before - _tables_of(self.model)
        present = getattr(self.model, self.tables, ())
        if tables or unread:  # no list for none
            kept = [table for table in present if table not in unread]
            setattr(self.model, self.tables, nn.ModuleList([*kept, *tables]))
        take_over_tables(self.model, tables)

    def _freeze(self) -> None:
        self.model.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, ValueTable):
                module.stage = None  # a table that learns by rows requires no gradient: reads are staged


class TransformerHost(Host):
    """A model of this package."""

    tables, ffn = "tables", "ffn"

    def __init__(self, model: Transformer) -> None:
        self.model, self.blocks = model, model.blocks
        self.dim, self.vocab_size = model.embedding.embedding_dim, model.embedding.num_embeddings
        self.norm_eps = cast("float", model.norm.eps)

    def occupant(self, layer: int, mode: str) -> nn.Module | None:
        """Returns the plugin before or after the layer, or the variant in parallel to its FFN."""
        block = self._block(layer)
        if mode == "parallel":
            return block.ffn.variant if isinstance(block.ffn, ParallelFFN) else None
        return {"before": block.before, "after": block.after}.get(mode)

    def put(self, layer: int, plugin: nn.Module, mode: str) -> None:
        """Puts a plugin into a block, as the constructor of `Transformer` does."""
        block = self._block(layer)
        if mode == "replace":
            block.ffn = plugin
            return
        if mode == "parallel":
            block.ffn = ParallelFFN(block.ffn, plugin, defer=False).train(block.training)
            return
        norm = stream_norm(plugin, self.dim, self.norm_eps)
        setattr(block, f"{mode}_norm", None if norm is None else norm.to(block.ffn_norm.weight))
        setattr(block, mode, plugin)

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block


class PretrainedHost(Host):
    """A model of transformers: with a head, or a decoder alone."""

    tables, ffn = "value_tables", "mlp"

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        # A model that has plugins already has a `model_type` of its own.
        kind = getattr(config, "trunk_type", getattr(config, "model_type", None))
        if config is None or kind not in LAYERS_OF:
            raise ConfigError(
                f"replace_ffn knows no layers of a {type(model).__name__}"
                f"{'' if kind is None else f' (model_type {kind!r})'}; allowed: Transformer of this package, and of "
                f"transformers the types {', '.join(LAYERS_OF)}."
            )
        self.model, self.blocks = model, getattr(model.base_model, LAYERS_OF[kind])
        self.dim, self.vocab_size = config.hidden_size, config.vocab_size
        self.norm_eps = float(config.layer_norm_epsilon if kind == "gpt2" else config.rms_norm_eps)
        ends = config.eos_token_id
        self.end_id = ends[0] if isinstance(ends, list) and ends else ends
        hooked = next((n for n, block in enumerate(self.blocks) if "forward" in vars(block)), None)
        if hooked is not None:
            raise ConfigError(
                f"layer {hooked} of this {type(model).__name__} has a forward of its own, as device_map= gives it one; "
                "call replace_ffn first, on a model without, then accelerate.dispatch_model."
            )

    def occupant(self, layer: int, mode: str) -> nn.Module | None:
        """Returns the plugin before or after the layer, or the one beside its `mlp`."""
        block = self.blocks[layer]
        if not isinstance(block, PluggedLayer):
            return None
        if mode == "parallel":
            return block.mlp.plugin if isinstance(block.mlp, PluginMLP) and block.mlp.base is not None else None
        return {"before": block.before, "after": block.after}.get(mode)

    def put(self, layer: int, plugin: nn.Module, mode: str) -> None:
        """Puts a plugin into a decoder layer."""
        plugged = plug(self.blocks[layer], layer, plugin, mode=mode, dim=self.dim, norm_eps=self.norm_eps)
        plugged.collector = warn_of_reports


def _tables_of(module: nn.Module) -> set[ValueTable]:
    return {part.table for part in module.modules() if isinstance(part, TableReference)}
