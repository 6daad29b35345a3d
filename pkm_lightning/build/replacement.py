"""Plugins in the layers of a model that exists already: one of this package, or one of transformers.

Nothing of transformers is imported: a model that is given has brought it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pkm_lightning.build.hosts import Host, PretrainedHost
from pkm_lightning.build.instantiate import accepted_keywords
from pkm_lightning.build.stream_scale import Place, match_streams
from pkm_lightning.errors import ConfigError, PkmError, check_choice, check_flag, check_integer, nearest
from pkm_lightning.ffn import HasZeroOutput, UsesTokenizer
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.model.placement import MODES
from pkm_lightning.model.plugin_checks import check_signature

#: Arguments of plugins that the model and the layers decide.
_DECIDED = ("dim", "layer", "n_layers", "vocab_size", "table", "table_number", "table_reader")


def replace_ffn(
    model: nn.Module,
    *,
    layers: Sequence[int],
    ffn: type[nn.Module],
    mode: Literal["replace", "parallel", "before", "after"] = "replace",
    shared: bool = True,
    learning: Literal["dense", "rows"] = "dense",
    zero_start: bool | None = None,
    freeze_trunk: bool = False,
    tokenizer: Any = None,
    **options: Any,
) -> list[nn.Module]:
    """Puts new plugins of one class into some layers of a model, and returns the plugins, by ascending layer.

    A plugin in the place of an FFN starts from random weights: the model has to be trained. In other modes it starts
    with an output of zero: the model computes what it computed before. A model of transformers makes one forward of
    random tokens for the scale of the plugin's matrices (`match_stream`).

    The model owns the value tables (`value_tables` of a model of transformers, `tables` of a `Transformer`), so that
    `state_dict` holds everything; those that only replaced plugins have read are dropped. The config.json that
    `save_pretrained` writes names the plugins, and `from_pretrained` builds them again: `docs/hugging-face.md`.

    Args:
        model: a `Transformer`, or a model of transformers of type gpt2, llama, mistral, qwen2 or qwen3.
        layers: numbers of layers, from 0.
        ffn: the class, such as `MemoryPlus`.
        mode: `replace` the FFN; add the plugin's output to it (`parallel`); or add it to the residual stream `before`
            or `after` the layer.
        shared: one value table for all these layers, instead of one per layer.
        learning: of the tables; `rows` needs a `TableOptimizer`.
        zero_start: start with an output of zero; None: in all modes but `replace`.
        freeze_trunk: what the model had before this call keeps its values; of several calls, set it in the first.
        tokenizer: of transformers, or a `pkm_lightning.data.base.TextCodec`, for a plugin that needs its texts
            (`canonical=True` of `Engram`); None: only the end-of-text token in the model's configuration is known.
        options: further arguments of the class; missing ones have its defaults.

    Raises:
        ConfigError: a model of another kind or one that cannot run where it is, a layer that it lacks or where another
            plugin stands, an option that the class lacks or the model decides, or a class that cannot start at zero.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from pkm_lightning import MemoryPlus, replace_ffn
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> (memory,) = replace_ffn(model, layers=[1], ffn=MemoryPlus, mode="parallel", n_keys=16)
        >>> model.value_tables[0]
        ValueTable(rows=256, dim=16, learning=dense)
    """
    host = Host.of(model)
    check_flag("shared", shared)
    check_flag("freeze_trunk", freeze_trunk)
    starts_at_zero = _starts_at_zero(mode, zero_start)
    request = PluginRequest.of(host, ffn, layers, mode, options, shared=shared, learning=learning)
    plugins, tables = request.make(host)
    for plugin in plugins:
        _bind(plugin, host, tokenizer)
        if starts_at_zero:
            _zero(plugin)
    placed = dict(zip(request.layers, plugins, strict=True))
    if starts_at_zero and isinstance(host, PretrainedHost):
        _match(host, placed, mode)
    host.replace(placed, mode, tables, freeze=freeze_trunk)
    if isinstance(host, PretrainedHost):
        # A room above this one, which imports transformers.
        importlib.import_module("pkm_lightning.huggingface.plugged").record(model, request)
    return plugins


@dataclass(frozen=True)
class PluginRequest:
    """Plugins of one class for some layers, as `replace_ffn` and the folder of a saved model describe them.

    Attributes:
        ffn, layers, mode, shared, learning, options: as of `replace_ffn`; layers ascend.
        bits: per value of tables that are quantised; None: they are not.
    """

    ffn: type[nn.Module]
    layers: tuple[int, ...]
    mode: str
    shared: bool = True
    learning: str = "dense"
    bits: Literal[8, 4, 2] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, host: Host, ffn: Any, layers: object, mode: str, options: Mapping[str, Any], **further: Any
    ) -> PluginRequest:
        """Returns the request for plugins in `host`, with ascending layers.

        Raises:
            ConfigError: layers, a mode, a class or options that there are not.
        """
        check_choice("mode", mode, MODES)
        chosen = _checked_layers(layers, len(host.blocks))
        _check_class(ffn, options)
        return cls(ffn, tuple(chosen), mode, options=options, **further)

    def make(self, host: Host) -> tuple[list[nn.Module], list[ValueTable]]:
        """Returns new plugins and their tables, on the device and in the dtype of their layers.

        Raises:
            ConfigError: a place where another plugin stands, or arguments that do not fit.
        """
        for layer in self.layers:
            if (occupant := host.occupant(layer, self.mode)) is not None:
                raise ConfigError(
                    f"layer {layer} has a {type(occupant).__name__} with mode={self.mode} already; choose another "
                    "layer, or another mode."
                )
        sizes = {"dim": host.dim, "n_layers": len(host.blocks), "vocab_size": host.vocab_size}
        groups = self._tables(sizes)
        plugins: list[nn.Module] = []
        for place, layer in enumerate(self.layers):
            keywords: dict[str, Any] = {**sizes, "layer": layer, "table_number": place, "table_reader": 0}
            if groups:
                reader, number = divmod(place, len(groups))
                group = groups[number]
                keywords |= {"table": group[0] if len(group) == 1 else group}
                keywords |= {"table_number": number, "table_reader": reader}
            plugins.append(self.ffn(**accepted_keywords(self.ffn, keywords), **self.options))
            check_signature(plugins[-1])
            host.adapt(layer, plugins[-1])
        return plugins, [table for group in groups for table in group]

    def _tables(self, sizes: Mapping[str, int]) -> list[list[ValueTable]]:
        """Returns the tables that the class requests, one group for all layers or one per layer; none for none."""
        table_spec = getattr(self.ffn, "table_spec", None)
        if table_spec is None:
            return []
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(self.ffn).parameters.items()
            if parameter.default is not inspect.Parameter.empty and name != "table"
        }
        n_groups = 1 if self.shared else len(self.layers)
        groups = []
        for number in range(n_groups):
            counts = {"table_number": number, "table_readers": len(self.layers) // n_groups}
            spec = table_spec(**_accepted_by(table_spec, {**defaults, **sizes, **counts, **self.options}))
            shape: dict[str, Any] = {"rows": spec.rows, "dim": spec.dim, "slices": spec.slices}
            groups.append([self._table(shape, std=spec.std, trainable=spec.trainable) for _ in range(spec.count)])
        return groups

    def _table(self, shape: Mapping[str, Any], *, std: float | None, trainable: bool) -> ValueTable:
        if self.bits is not None:
            return QuantizedTable(**shape, bits=self.bits)
        return ValueTable(**shape, std=std, trainable=trainable, learning=self.learning)


@dataclass(frozen=True)
class _EndToken:
    """A tokenizer of which no more is known."""

    eos_id: int | None


@dataclass(frozen=True)
class _Codec(_EndToken):
    """What plugins need of a tokenizer of transformers."""

    vocab_size: int
    decode: Any


def _bind(plugin: nn.Module, host: Host, tokenizer: Any) -> None:
    """Gives a plugin what it needs of the tokenizer.

    Raises:
        ConfigError: it needs more than is known.
    """
    if not isinstance(plugin, UsesTokenizer) or (tokenizer is None and not isinstance(host, PretrainedHost)):
        return
    if tokenizer is None:
        plugin.bind_tokenizer(_EndToken(host.end_id))
    elif hasattr(tokenizer, "eos_id"):
        plugin.bind_tokenizer(tokenizer)
    else:
        end_id = tokenizer.eos_token_id if host.end_id is None else host.end_id
        plugin.bind_tokenizer(_Codec(end_id, len(tokenizer), tokenizer.decode))


def _zero(plugin: nn.Module) -> None:
    if not isinstance(plugin, HasZeroOutput):
        raise ConfigError(
            f"{type(plugin).__name__} has no zero_output(), by which the model would compute what it did before; give "
            "the class one, or set zero_start=False."
        )
    plugin.zero_output()


def _starts_at_zero(mode: str, zero_start: bool | None) -> bool:
    check_flag("zero_start", zero_start is None or zero_start)
    if zero_start and mode == "replace":
        raise ConfigError(
            "zero_start=True under mode='replace' leaves the layers without an FFN at first; use mode='parallel', "
            "which keeps theirs, or zero_start=False."
        )
    return mode != "replace" and zero_start is not False


def _match(host: PretrainedHost, plugins: Mapping[int, nn.Module], mode: str) -> None:
    """Initialises plugins for the stream of the model in which they will stand.

    Raises:
        ConfigError: the model cannot run where it is.
    """
    places = []
    for layer, plugin in plugins.items():
        block = host.blocks[layer]
        beside = getattr(block, host.ffn) if mode == "parallel" else None
        places.append(Place(plugin, block, block if getattr(plugin, "normalises_input", False) else beside))
    embedding: Any = host.model.get_input_embeddings()  # type: ignore[operator]
    try:
        match_streams(host.model, embedding, places)
    except PkmError:
        raise
    except Exception as error:  # whatever the model raises
        raise ConfigError(
            f"replace_ffn runs a few tokens through the model, to find the scale of its residual stream, and got a "
            f"{type(error).__name__}: {error}; move the model to where it can run first."
        ) from error


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


def _check_class(ffn: Any, options: Mapping[str, Any]) -> None:
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


def _accepted_by(function: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Selects those of `keywords` that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return keywords
    return {name: value for name, value in keywords.items() if name in parameters}
