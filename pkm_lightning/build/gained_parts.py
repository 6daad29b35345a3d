"""A model that has parts which the weights that it starts from lack: adapters, and FFN variants beside the others.

The weights are renamed to what the model calls them: a layer's FFN is `ffn.base` where a variant runs in parallel, an
adapted layer is `base_layer` of its adapter, and tables are numbered over all variants.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pkm_lightning.build.adapters import base_name
from pkm_lightning.build.variant_figures import tables_of_variants
from pkm_lightning.build.variants import names_by_place, variants
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.model import Transformer

Config = Mapping[str, Any]

_MODEL = "state_dict.model."


def gained_variants(config: Config, trained: Config) -> list[str]:
    """Returns the names of the variants of `config` that a model of the configuration `trained` lacks.

    A variant of one name and another class is another one.
    """
    earlier = {variant.name: variant.class_name for variant in variants(trained)}
    return [variant.name for variant in variants(config) if earlier.get(variant.name) != variant.class_name]


def names_of_variants(model: Transformer, config: Config, chosen: Collection[str]) -> set[str]:
    """Returns the names of the weights and buffers of these variants: of their plugins, norms and tables."""
    by_place = names_by_place(config)
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = []
    for layer, part, plugin in model.plugins():
        if by_place.get((layer, part)) in chosen:
            prefixes += [f"{names[id(plugin)]}.", f"{names[id(model.blocks[layer])]}.{part}_norm."]
    tables = tables_of_variants(model, config)
    prefixes += [f"tables.{number}." for name in chosen for number in tables[name]]
    return {name for name in model.state_dict() if name.startswith(tuple(prefixes))}


def rename_for(checkpoint: SavedCheckpoint, model: Transformer, config: Config) -> set[str]:
    """Renames the weights of `checkpoint` to what `model`, built from `config`, calls them.

    Returns:
        The names in the module's state of what the model has gained: nothing of it is stored.
    """
    gained = names_of_variants(model, config, gained_variants(config, checkpoint.config))
    new, renamed, tables = set[str](), dict[str, str](), dict[str, int]()
    for name in model.state_dict():
        earlier = base_name(name)
        if name in gained or earlier is None:
            new.add(f"model.{name}")
            continue
        if earlier.startswith("tables."):
            _, number, part = earlier.split(".", 2)
            earlier = f"tables.{tables.setdefault(number, len(tables))}.{part}"
        elif _MODEL + earlier not in checkpoint.shapes:
            earlier = earlier.replace(".base.", ".", 1)
        if earlier != name and _MODEL + earlier in checkpoint.shapes:
            renamed[_MODEL + name] = _MODEL + earlier
    checkpoint.rename(renamed)
    return new
