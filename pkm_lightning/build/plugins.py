"""The plugins of all layers, by configuration: those of every variant in its layers, and the tables that they read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pkm_lightning.build.instantiate import accepted_keywords, instantiate, target_class
from pkm_lightning.build.stored_tables import RowsOnFile
from pkm_lightning.build.variants import MAIN, Variant, naming, plugin_variants, variants
from pkm_lightning.errors import ConfigError, check_flag, check_integer, check_range
from pkm_lightning.ffn import TableSpec
from pkm_lightning.memory import TableMesh, ValueTable
from pkm_lightning.model.plugin_checks import CONTRACT, called
from pkm_lightning.model.plugin_outputs import ParallelFFN

Config = Mapping[str, Any]

#: Keys of `table` that a `ValueTable` does not take.
_TABLE_BUILDER_KEYS = ("shared", "optimizer", "shard", "group", "trainable", "path", "tensor")


@dataclass
class LayerPlugins:
    """The plugins of all layers.

    Attributes:
        ffns: one plugin per layer.
        before, after: further ones by layer.
        tables: all value tables, each once.
        write_after: layers after which deferred outputs are added.
    """

    ffns: list[nn.Module] = field(default_factory=list)
    before: dict[int, nn.Module] = field(default_factory=dict)
    after: dict[int, nn.Module] = field(default_factory=dict)
    tables: list[ValueTable] = field(default_factory=list)
    write_after: int = 0


@dataclass
class PlacedPlugins:
    """The plugins of all layers, before they are combined with each other.

    Attributes:
        by_mode: of each layer, the plugins by `placement.mode`, and `base` for the base FFN where it runs.
        tables: all value tables, each once.
        main: of each layer, the mode of the variant `ffn`; None where it does not run.
    """

    by_mode: list[dict[str, nn.Module]]
    tables: list[ValueTable]
    main: list[str | None]


def build_plugins(config: Config, mesh: TableMesh | None) -> LayerPlugins:
    """Builds what the layers of a `Transformer` run; see `pkm_lightning.build.model.build_model`.

    Raises:
        ConfigError: as `place_plugins`.
    """
    placed = place_plugins(config, mesh)
    placement = variants(config)[0].placement
    built = LayerPlugins(tables=placed.tables, write_after=placement.delay(len(placed.by_mode)))
    for layer, plugins in enumerate(placed.by_mode):
        ffn = plugins.get("replace", plugins.get("base"))
        assert ffn is not None
        if "parallel" in plugins:
            defers = placed.main[layer] == "parallel" and built.write_after > 0
            ffn = ParallelFFN(ffn, plugins["parallel"], defer=defers)
        built.ffns.append(ffn)
        for mode, of_layers in (("before", built.before), ("after", built.after)):
            if mode in plugins:
                of_layers[layer] = plugins[mode]
    return built


def place_plugins(config: Config, mesh: TableMesh | None) -> PlacedPlugins:
    """Builds the plugins of all layers and their tables.

    Raises:
        ConfigError: sizes, layers or classes that do not fit, or two variants in one place.
    """
    model = config["model"]
    n_layers = int(model["n_layers"])
    of_all = plugin_variants(config)
    places = _places(of_all, n_layers)
    groups = []
    for variant in of_all:
        with naming(variant.name):
            groups.append(_build_tables(variant, config, len(variant.layers(n_layers)), mesh))
    placed = PlacedPlugins([], [table for of_variant in groups for group in of_variant for table in group], [])
    for layer in range(n_layers):
        common = {
            "dim": int(model["dim"]),
            "layer": layer,
            "n_layers": n_layers,
            "vocab_size": int(model["vocab_size"]),
        }
        plugins: dict[str, nn.Module] = {}
        # The base FFN is built where it runs, since its draws and its size count.
        if "replace" not in places[layer] and model.get("base_ffn"):
            plugins["base"] = instantiate(model["base_ffn"], "model.base_ffn", **common)
        for mode, number in places[layer].items():
            variant, of_variant = of_all[number], groups[number]
            with naming(variant.name):
                place = variant.layers(n_layers).index(layer)
                plugins[mode] = instantiate(variant.ffn, "ffn", **common, **_tables_of(of_variant, place))
        placed.by_mode.append(plugins)
        placed.main.append(next((m for m, number in places[layer].items() if of_all[number].name == MAIN), None))
    return placed


def _places(of_all: list[Variant], n_layers: int) -> list[dict[str, int]]:
    """Returns, by layer, the number of the variant in each mode.

    Raises:
        ConfigError: two variants of one mode in a layer.
    """
    places: list[dict[str, int]] = [{} for _ in range(n_layers)]
    for number, variant in enumerate(of_all):
        for layer in variant.layers(n_layers):
            mode = variant.placement.mode
            if mode in places[layer]:
                earlier = of_all[places[layer][mode]]
                raise ConfigError(
                    f"{earlier.key} and {variant.key} are both placed in layer {layer} with placement.mode={mode}; set "
                    f"{earlier.layers_key} or {variant.layers_key} to other layers, or another mode for one of them."
                )
            places[layer][mode] = number
    return places


def _tables_of(groups: list[list[ValueTable]], place: int) -> dict[str, Any]:
    """Returns the keywords `table` (one table, or a list), `table_number` and `table_reader` of the plugin at `place`
    of its variant's layers; without tables the number is that of the plugin."""
    if not groups:
        return {"table_number": place, "table_reader": 0}
    reader, number = divmod(place, len(groups))
    group = groups[number]
    return {"table": group[0] if len(group) == 1 else group, "table_number": number, "table_reader": reader}


def _build_tables(variant: Variant, config: Config, n_placed: int, mesh: TableMesh | None) -> list[list[ValueTable]]:
    """Builds one group of tables for all layers if `table.shared`, else one per placed layer; none if not needed.

    A plugin needs tables if its constructor takes the keyword `table`.
    """
    cls = target_class(variant.ffn, "ffn")
    if "table" not in accepted_keywords(cls, {"table": None}) or not n_placed:
        return []
    if not hasattr(cls, "table_spec"):
        raise ConfigError(
            f"ffn._target_={variant.ffn['_target_']} takes a table, but has no class method "
            "table_spec(**arguments) that returns its rows and dim."
        )
    check_flag("table.shared", variant.table["shared"])
    settings = {name: value for name, value in variant.table.items() if name not in _TABLE_BUILDER_KEYS}
    n_groups = 1 if variant.table["shared"] else n_placed
    groups: list[list[ValueTable]] = []
    for number in range(n_groups):
        counts = {"table_number": number, "table_readers": n_placed // n_groups}
        spec = _table_spec(variant, cls, config["model"], counts)
        shape: dict[str, Any] = {"rows": spec.rows, "dim": spec.dim, "std": spec.std}
        # All ranks read the file, each what it needs.
        if mesh is not None and variant.table.get("device") != "mmap":
            shape["mesh"] = mesh
        if spec.slices > 1:
            shape["slices"] = spec.slices
        files = [
            RowsOnFile(variant.table, spec, number * spec.count + place, n_groups * spec.count)
            for place in range(spec.count)
        ]
        groups.append([instantiate(settings, "table", **shape, **file.keywords()) for file in files])
        for table, file in zip(groups[-1], files, strict=True):
            table.first_rows = file.first_rows
    return groups


def _table_spec(variant: Variant, cls: Any, model: Config, counts: dict[str, int]) -> TableSpec:
    """Returns the checked tables that the plugin requests for a table of this number and these readers."""
    arguments = {str(k): v for k, v in variant.ffn.items() if not str(k).startswith("_")}
    sizes = {name: int(model[name]) for name in ("dim", "n_layers", "vocab_size")} | counts
    parameters = inspect.signature(cls.table_spec).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        sizes = {name: value for name, value in sizes.items() if name in parameters}
    return _checked_spec(f"{variant.ffn['_target_']}.table_spec", cls.table_spec, {**sizes, **arguments})


def _checked_spec(name: str, table_spec: Callable[..., Any], arguments: dict[str, Any]) -> TableSpec:
    """Returns the tables that a plugin requests; refuses a method that raises, and what is no `TableSpec` of sizes."""
    spec = called(name, table_spec, **arguments)
    if not isinstance(spec, TableSpec):
        raise ConfigError(f"{name} returned {spec!r:.60}; it returns a TableSpec(rows=, dim=) ({CONTRACT}).")
    for size in ("rows", "dim", "count", "slices"):
        check_integer(f"{name}(...).{size}", getattr(spec, size), low=1)
    if spec.std is not None:
        check_range(f"{name}(...).std", spec.std, 0)
    check_flag(f"{name}(...).trainable", spec.trainable)
    return spec
