"""From a resolved configuration to a model, in memory or on the meta device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from pkm_lightning.build.finetuning import adapt
from pkm_lightning.build.freezing import freeze_parameters
from pkm_lightning.build.instantiate import instantiate, target_class
from pkm_lightning.build.plugins import build_plugins, place_plugins
from pkm_lightning.build.stored_tables import fill_first_rows
from pkm_lightning.build.stream_scale import Place, match_streams
from pkm_lightning.build.variants import MAIN, by_place, names_by_place, naming
from pkm_lightning.capacity.setting import PRECISIONS, precision_name
from pkm_lightning.errors import ConfigError, check_integer, nearest
from pkm_lightning.ffn import HasPretrained, HasZeroOutput, UsesTokenizer
from pkm_lightning.memory import TableMesh
from pkm_lightning.model import Transformer
from pkm_lightning.model.plugin_checks import CONTRACT, called, check_plugins

Config = Mapping[str, Any]

#: Keys of `model` that the transformer does not take as they stand.
_BUILDER_KEYS = ("n_layers", "base_ffn", "ffn_dim", "memory", "compile")
#: Facts about a trunk with a `_target_`, which `complete` found in its files.
_FACTS = ("dim", "vocab_size", "norm_eps", "tokenizer_digest")
#: Arguments of the transformer that are built here, and are not keys of `model`.
_BUILT_ARGUMENTS = {"ffns", "before", "after", "tables", "write_after"}


def build_model(config: Config, table_mesh: TableMesh | None = None) -> Transformer:
    """Builds the transformer of `config`, whose `model.vocab_size` is a number.

    It is allocated on the device of the current `torch.device` context (`meta` allocates nothing); of a sharded table,
    only this rank's shard is allocated.

    Raises:
        ConfigError: sizes, layers or classes that do not fit.
    """
    model = config["model"]
    # A configuration of the model alone, as an exported folder holds it, has no keys of training.
    frozen = (config.get("optim") or {}).get("freeze") or ()
    if "_target_" in model:
        trunk = _build_trunk(config, table_mesh)
        freeze_parameters(trunk, frozen, by_place(config))
        adapt(trunk, config)
        return trunk
    check_integer("model.n_layers", model["n_layers"], low=1)
    check_integer("model.dim", model["dim"], low=1)
    if not isinstance(model["vocab_size"], int):
        raise ConfigError(
            f"model.vocab_size={model['vocab_size']} needs a data module with a vocab_size; set it to a number."
        )
    plugins = build_plugins(config, table_mesh)
    arguments = {str(name): value for name, value in model.items() if name not in _BUILDER_KEYS}
    unknown = arguments.keys() - (inspect.signature(Transformer).parameters.keys() - _BUILT_ARGUMENTS)
    if unknown:
        raise ConfigError(
            f"model.{min(unknown)} is not a key of model; remove it.{nearest(min(unknown), model.keys() - unknown)}"
        )
    transformer = Transformer(**arguments, **vars(plugins))
    freeze_parameters(transformer, frozen, by_place(config))
    adapt(transformer, config)
    return transformer


def complete_trunk(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with what the files of a trunk that `model._target_` names say about it.

    Raises:
        PkmError: files that are missing, damaged or not of such a model.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or "_target_" not in model:
        return config
    complete = getattr(target_class(model, "model"), "complete", None)
    return config if complete is None else complete(config)


def _build_trunk(config: Config, table_mesh: TableMesh | None) -> Transformer:
    """Builds the trunk that `model._target_` names, which has the interface of `pkm_lightning.model.Trunk`.

    A class that takes `plugins` and `tables` gets those of its layers.
    """
    model = config["model"]
    # By keyword and not in the configuration, since Hydra would make objects of a `_target_` in a foreign file.
    built = {name: model[name] for name in ("architecture",) if name in model}
    placed = place_plugins(config, table_mesh)
    if any(placed.by_mode):
        built |= {"plugins": dict(enumerate(placed.by_mode)), "tables": placed.tables}
    keys = {name: value for name, value in model.items() if name not in (*_FACTS, *_BUILDER_KEYS, *built)}
    trunk: Transformer = instantiate(keys, "model", **built)
    return trunk


def build_meta_model(config: Config) -> Transformer:
    """Builds the same model on the meta device, in the dtype that the Trainer would give it: shapes without memory."""
    with weight_dtype(config), torch.device("meta"):
        return build_model(config)


def check_foreign_plugins(model: Transformer, config: Config) -> None:
    """Refuses plugins from outside the package that break their contract; see `check_plugins`.

    Raises:
        ConfigError: naming the plugin and what the contract asks for.
    """
    with weight_dtype(config):
        check_plugins((plugin for _, _, plugin in model.plugins()), int(config["model"]["dim"]))


def bind_tokenizer(model: Transformer, tokenizer: Any, config: Config) -> None:
    """Gives the plugins of a new model what they need of the tokenizer of its data; None: the data have none.

    Raises:
        ConfigError: a plugin cannot work with it.
    """
    variants = names_by_place(config)
    for layer, name, plugin in model.plugins():
        if not isinstance(plugin, UsesTokenizer):
            continue
        with naming(variants.get((layer, name), MAIN)):
            called(f"layer {layer}, {name}: bind_tokenizer", plugin.bind_tokenizer, tokenizer=tokenizer)


def load_pretrained(model: Transformer, config: Config, gained: Collection[str] = ()) -> None:
    """Gives the plugins and the tables of a new model what they take from files, and then a start at zero.

    Those that start at zero in a pretrained trunk are initialised for its stream. Where there are `gained` variants,
    the weights of the trunk follow later, and nothing can be measured.

    Raises:
        PkmError: files that are missing, damaged or of another model; or as `start_at_zero`.
    """
    fill_first_rows(model)
    for _, _, plugin in model.plugins():
        if isinstance(plugin, HasPretrained):
            plugin.load_pretrained()
    started = start_at_zero(model, config, gained)
    if not gained:
        places = (Place(plugin, model.blocks[layer], plugin) for layer, plugin in started)
        match_streams(model, model.embedding, places)


def start_at_zero(
    model: Transformer, config: Config, gained: Collection[str] = ()
) -> list[tuple[int, torch.nn.Module]]:
    """Sets the output of those plugins to zero for which `placement.zero_start` asks; the model may be on meta.

    Where it asks for nothing these are the plugins that stand beside a trained FFN: in a pretrained trunk all of them,
    else those of the variants `gained` since the training. These plugins are returned with the numbers of their layers.

    Raises:
        ConfigError: a plugin cannot start so.
    """
    places = by_place(config)
    started: list[tuple[int, torch.nn.Module]] = []
    for layer, name, plugin in model.plugins():
        variant = places.get((layer, name))
        if variant is None:
            continue
        wanted = variant.placement.zero_start
        is_trained = "_target_" in config["model"] or variant.name in gained
        stands_beside = is_trained and variant.placement.mode != "replace"
        if not (stands_beside if wanted is None else wanted):
            continue
        with naming(variant.name):
            if not isinstance(plugin, HasZeroOutput):
                raise ConfigError(
                    f"ffn._target_={variant.ffn['_target_']} has no zero_output(), by which its output starts at zero "
                    f"({CONTRACT}); add the method, or set placement.zero_start=false."
                )
            called(f"layer {layer}, {name}: zero_output", plugin.zero_output)
        if stands_beside:
            started.append((layer, plugin))
    return started


@contextlib.contextmanager
def weight_dtype(config: Config) -> Iterator[None]:
    """Makes weights within the block in the dtype that the Trainer would give them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[precision_name(config["trainer"]["precision"])])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attention_context(config: Config) -> int:
    """Returns the tokens in attention for cost figures: `data.seq_len`, or 1 if the data has no such key."""
    return int(config["data"].get("seq_len") or 1)
