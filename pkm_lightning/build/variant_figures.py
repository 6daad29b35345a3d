"""What each variant of a configuration is and costs, in the layers that run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pkm_lightning.build.variants import Config, Variant, names_by_place, variants
from pkm_lightning.ffn import HasReads
from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer
from pkm_lightning.model.plugin_checks import plugin_cost


def variant_figures(model: Transformer, config: Config) -> dict[str, dict[str, Any]]:
    """Returns, by the name of each variant (`ffn`, or the key in `extra_ffns`):

    | key | meaning |
    |---|---|
    | class, mode, layers | the plugin's class, `placement.mode`, numbers of its layers |
    | tables | numbers N of the tables `tables.N` that it reads |
    | params | `total`, tables included, `table`, and `active`, those of one token's arithmetic |
    | flops_per_token | `train` (forward and backward) and `decode` |
    | bytes_per_token | `train`: of the rows that one token moves |

    Figures that the plugin's `cost()` computes are None where it has none.
    """
    plugins, tables, n_layers = _plugins(model, config), list(model.tables), int(config["model"]["n_layers"])
    return {
        variant.name: _figures(variant, variant.layers(n_layers), plugins.get(variant.name, []), tables)
        for variant in variants(config)
    }


def tables_of_variants(model: Transformer, config: Config) -> dict[str, list[int]]:
    """Returns, by the name of each variant, the numbers N of the tables `tables.N` that it reads."""
    plugins, tables = _plugins(model, config), list(model.tables)
    read = {name: {id(table) for plugin in of_name for table in _tables(plugin)} for name, of_name in plugins.items()}
    return {
        variant.name: [n for n, table in enumerate(tables) if id(table) in read.get(variant.name, ())]
        for variant in variants(config)
    }


def _plugins(model: Transformer, config: Config) -> dict[str, list[nn.Module]]:
    """Returns the plugins of each variant by its name."""
    names = names_by_place(config)
    plugins: dict[str, list[nn.Module]] = {}
    for layer, part, plugin in model.plugins():
        plugins.setdefault(names.get((layer, part), ""), []).append(plugin)
    return plugins


def _figures(variant: Variant, layers: list[int], plugins: list[nn.Module], tables: list[nn.Module]) -> dict[str, Any]:
    read = {id(table): table for plugin in plugins for table in _tables(plugin)}
    table_params = sum(table.size for table in read.values())
    own_tables = {id(table.weight) for table in read.values()}
    dense = sum(p.numel() for plugin in plugins for p in plugin.parameters() if id(p) not in own_tables)
    costs = [cost for cost in map(plugin_cost, plugins) if cost is not None]
    known = len(costs) == len(plugins)
    train_flops = sum(3 * (c.flops if c.train_flops is None else c.train_flops) for c in costs)
    return {
        "class": variant.class_name,
        "mode": variant.placement.mode,
        "layers": layers,
        "tables": [number for number, table in enumerate(tables) if id(table) in read],
        "params": {
            "total": dense + table_params,
            # Heads and layers may read the same rows of a small table.
            "active": min(sum(c.active_params for c in costs), dense + table_params) if known else None,
            "table": table_params,
        },
        "flops_per_token": {
            "train": train_flops if known else None,
            "decode": sum(c.flops for c in costs) if known else None,
        },
        "bytes_per_token": {"train": 3 * sum(c.lookup_bytes for c in costs) if known else None},
    }


def _tables(plugin: nn.Module) -> Iterator[ValueTable]:
    """Yields the tables that a plugin reads, as far as it describes them, and those of its own."""
    if isinstance(plugin, HasReads):
        yield from (read.table for read in plugin.reads())
    yield from (module for module in plugin.modules() if isinstance(module, ValueTable))
