"""Plugins in the place of the FFNs of a model that exists already: one of this package, or one of transformers.

Nothing of transformers is imported: a model that is given has brought it.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.build.instantiate import accepted_keywords
from pkm_lightning.errors import ConfigError, check_flag, check_integer, nearest
from pkm_lightning.ffn import FFNOutput, HasAfterStep, HasRowIds
from pkm_lightning.memory import TableReference, ValueTable, take_over_tables
from pkm_lightning.model import Transformer
from pkm_lightning.model.plugged_layer import PluggedLayer, plug, plugged_layers

#: By `model_type` of transformers, the name of the list of layers in the decoder. Each layer has its FFN as `mlp`.
LAYERS_OF = {"gpt2": "h", "llama": "layers", "mistral": "layers", "qwen2": "layers", "qwen3": "layers"}
#: Of the tables in a model of transformers.
_TABLES = "value_tables"
#: Arguments of plugins that the model and the layers decide.
_DECIDED = ("dim", "layer", "n_layers", "vocab_size", "table", "table_number", "table_reader")


@dataclass
class FFNReports:
    """What plugins in a model of transformers report beside their outputs; `ffn_reports` collects it.

    Attributes:
        outputs: each plugin with its output, one entry per forward.

    Example: that of `ffn_reports`.
    """

    outputs: list[tuple[nn.Module, FFNOutput]] = field(default_factory=list)

    def collect(self, layer: PluggedLayer, outputs: dict[str, FFNOutput]) -> None:
        """Takes the outputs of one forward of a layer, by the names of its plugins."""
        plugins = dict(layer.named_plugins())
        self.outputs += [(plugins[name], output) for name, output in outputs.items()]

    def aux_loss(self) -> Tensor | float:
        """Returns the sum of the losses of all plugins, such as that which balances experts; 0.0 if there are none."""
        losses: list[Tensor] = []
        for plugin, output in self.outputs:
            losses += output.aux_losses.values()
            is_lost = any(not loss.requires_grad for loss in output.aux_losses.values())
            if is_lost and torch.is_grad_enabled() and any(p.requires_grad for p in plugin.parameters()):
                warnings.warn(
                    f"the losses of {type(plugin).__name__} ({', '.join(output.aux_losses)}) have no gradient, since "
                    "its forward ran without one: checkpoint activations with use_reentrant=False.",
                    stacklevel=2,
                )
        return sum(losses[1:], start=losses[0]) if losses else 0.0

    def after_step(self) -> None:
        """Passes the summed statistics of the step to each plugin that keeps some, such as batch-normalised queries."""
        sums: dict[nn.Module, dict[str, Tensor]] = {}
        for plugin, output in self.outputs:
            of_plugin = sums.setdefault(plugin, {})
            for name, value in output.step_stats.items():
                of_plugin[name] = of_plugin[name] + value if name in of_plugin else value
        for plugin, stats in sums.items():
            if isinstance(plugin, HasAfterStep):
                plugin.after_step(stats)


def _warn_of_reports(layer: PluggedLayer, outputs: dict[str, FFNOutput]) -> None:
    plugins = dict(layer.named_plugins())
    for name, output in outputs.items():
        if layer.training and (output.aux_losses or output.step_stats):
            names = ", ".join((*output.aux_losses, *output.step_stats))
            warnings.warn(
                f"{type(plugins[name]).__name__} reports losses or statistics ({names}) that nobody collects: run the "
                "forward within pkm_lightning.ffn_reports(model).",
                stacklevel=3,
            )


@contextlib.contextmanager
def ffn_reports(model: nn.Module) -> Iterator[FFNReports]:
    """Collects, within the block, the losses and statistics of plugins that `replace_ffn` put into `model`.

    A model of this package returns them itself (`ModelOutput`). With activation checkpointing call `backward` after the
    block, so that the repeated forwards are not collected.

    Example:
        ```python
        with ffn_reports(model) as reports:
            loss = model(input_ids, labels=input_ids).loss + reports.aux_loss()
        loss.backward()
        optimizer.step()
        reports.after_step()
        ```
    """
    reports, layers = FFNReports(), plugged_layers(model)
    for layer in layers:
        layer.collector = reports.collect
    try:
        yield reports
    finally:
        for layer in layers:
            layer.collector = _warn_of_reports


def replace_ffn(
    model: nn.Module,
    *,
    layers: Sequence[int],
    ffn: type[nn.Module],
    shared: bool = True,
    learning: Literal["dense", "rows"] = "dense",
    **options: Any,
) -> list[nn.Module]:
    """Replaces the FFN of some layers by new plugins of one class, and returns the plugins, by ascending layer.

    Their weights are new: the model has to be trained. It owns the value tables (`value_tables` of a model of
    transformers, `tables` of a `Transformer`), so that `state_dict` holds everything; those that only replaced plugins
    have read are dropped. To load one, make the same model, call `replace_ffn` with the same arguments, then
    `load_state_dict`. `save_pretrained` writes all weights, but a `config.json` that does not know of the plugins:
    `from_pretrained` would leave them out, and draw dense FFNs.

    Args:
        model: a `Transformer`, or a model of transformers of type gpt2, llama, mistral, qwen2 or qwen3.
        layers: numbers of layers, from 0.
        ffn: the class, such as `MemoryPlus`.
        shared: one value table for all these layers, instead of one per layer.
        learning: of the tables; `rows` needs a `TableOptimizer`.
        options: further arguments of the class; missing ones have its defaults.

    Raises:
        ConfigError: a model of another kind, a layer that it does not have, an option that the class does not have or
            that the model decides, or a plugin that needs more than the hidden states in a model of transformers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from pkm_lightning import MemoryPlus, replace_ffn
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> (memory,) = replace_ffn(model, layers=[1], ffn=MemoryPlus, n_keys=16)
        >>> model.value_tables[0]
        ValueTable(rows=256, dim=16, learning=dense)
    """
    host = _Host.of(model)
    check_flag("shared", shared)
    chosen = _checked_layers(layers, len(host.blocks))
    _check_class(ffn, options, in_transformers=host.attribute == "mlp")
    sizes = {"dim": host.dim, "n_layers": len(host.blocks), "vocab_size": host.vocab_size}
    groups = _new_tables(ffn, options, sizes, 1 if shared else len(chosen), len(chosen), learning)
    plugins: list[nn.Module] = []
    for place, layer in enumerate(chosen):
        keywords: dict[str, Any] = {**sizes, "layer": layer, "table_number": place, "table_reader": 0}
        if groups:
            reader, number = divmod(place, len(groups))
            group = groups[number]
            keywords |= {"table": group[0] if len(group) == 1 else group}
            keywords |= {"table_number": number, "table_reader": reader}
        plugins.append(ffn(**accepted_keywords(ffn, keywords), **options))
    tables = [table for group in groups for table in group]
    host.replace(dict(zip(chosen, plugins, strict=True)), tables)
    take_over_tables(model, tables)
    return plugins


@dataclass
class _Host:
    """A model that receives plugins: `attribute` names the FFN of each of `blocks`, `tables` the list of its tables."""

    model: nn.Module
    blocks: nn.ModuleList
    attribute: str
    tables: str
    dim: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module) -> _Host:
        if isinstance(model, Transformer):
            sizes = model.embedding.embedding_dim, model.embedding.num_embeddings
            return cls(model, model.blocks, "ffn", "tables", *sizes)
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if config is None or kind not in LAYERS_OF:
            raise ConfigError(
                f"replace_ffn knows no layers of a {type(model).__name__}"
                f"{'' if kind is None else f' (model_type {kind!r})'}; allowed: Transformer of this package, and of "
                f"transformers the types {', '.join(LAYERS_OF)}."
            )
        blocks = getattr(model.base_model, LAYERS_OF[kind])
        return cls(model, blocks, "mlp", _TABLES, config.hidden_size, config.vocab_size)

    def replace(self, plugins: dict[int, nn.Module], tables: Sequence[ValueTable]) -> None:
        """Puts plugins in the place of the FFNs of layers, and registers their tables.

        A table that nobody reads any more goes: a `TableOptimizer` would wait for its reads.
        """
        replaced = [self._put(layer, plugin) for layer, plugin in plugins.items()]
        unread = set().union(*map(_tables_of, replaced)) - _tables_of(self.model)
        present = getattr(self.model, self.tables, ())
        if tables or unread:  # no list for none
            kept = [table for table in present if table not in unread]
            setattr(self.model, self.tables, nn.ModuleList([*kept, *tables]))

    def _put(self, layer: int, plugin: nn.Module) -> nn.Module:
        """Returns the FFN of a layer, after `plugin` has taken its place, mode, device and dtype."""
        before: nn.Module = getattr(self.blocks[layer], self.attribute)
        if (weight := next(before.parameters(), None)) is not None:
            # Quantised weights are integers.
            floats = (p for p in (*before.parameters(), *self.model.parameters()) if p.is_floating_point())
            plugin.to(weight.device, next(floats, weight).dtype)
        plugin.train(before.training)
        if self.attribute == "mlp":
            plugged = plug(self.blocks[layer], layer, plugin, mode="replace", dim=self.dim, norm_eps=0.0)
            plugged.collector = _warn_of_reports
        else:
            setattr(self.blocks[layer], self.attribute, plugin)
        return before


def _tables_of(module: nn.Module) -> set[ValueTable]:
    return {part.table for part in module.modules() if isinstance(part, TableReference)}


def _checked_layers(layers: object, count: int) -> list[int]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(f"layers={layers!r:.60} is no list of layers; give their numbers, as in layers=[1].")
    layers = list(layers)
    for layer in layers:
        check_integer("layers", layer, low=0, high=count - 1)
    chosen = sorted(layers)
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ConfigError(f"layers={layers} names {'a layer twice' if chosen else 'no layer'}; name each once.")
    return chosen


def _check_class(ffn: Any, options: dict[str, Any], *, in_transformers: bool) -> None:
    if not (isinstance(ffn, type) and issubclass(ffn, nn.Module)):
        shown = f"an instance of {type(ffn).__name__}" if isinstance(ffn, nn.Module) else repr(ffn)
        raise ConfigError(
            f"ffn={shown:.60} is no class of FFNs; give the class, as in ffn=MemoryPlus, and its options."
        )
    known = inspect.signature(ffn).parameters
    unknown = [name for name in options if name not in known]
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        raise ConfigError(f"{ffn.__name__} has no argument {unknown[0]!r}.{nearest(unknown[0], known)}")
    if decided := [name for name in options if name in _DECIDED]:
        advice = "set learning and shared for its tables" if decided[0] == "table" else "leave it out"
        raise ConfigError(f"{decided[0]} is no option of replace_ffn, which takes it from the model; {advice}.")
    if in_transformers and (hasattr(ffn, "row_ids") or not getattr(ffn, "position_wise", False)):
        what = "reads rows by token id" if issubclass(ffn, HasRowIds) else "is not position_wise"
        raise ConfigError(
            f"ffn={ffn.__name__} {what}, and an mlp of transformers is given hidden states alone; choose a "
            "position-wise plugin, such as MemoryPlus."
        )


def _new_tables(
    ffn: type[nn.Module], options: dict[str, Any], sizes: dict[str, int], groups: int, placed: int, learning: str
) -> list[list[ValueTable]]:
    """Returns `groups` groups of the tables that the class requests; none where it requests none."""
    table_spec = getattr(ffn, "table_spec", None)
    if table_spec is None:
        return []
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ffn).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name != "table"
    }
    made = []
    for number in range(groups):
        counts = {"table_number": number, "table_readers": placed // groups}
        wanted = {**defaults, **sizes, **counts, **options}
        spec = table_spec(**_accepted_by(table_spec, wanted))
        shape = {"rows": spec.rows, "dim": spec.dim, "std": spec.std, "slices": spec.slices}
        made.append([ValueTable(**shape, trainable=spec.trainable, learning=learning) for _ in range(spec.count)])
    return made


def _accepted_by(function: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Selects those of `keywords` that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}
