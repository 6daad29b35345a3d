"""The FFN variants of a configuration: `ffn` with `placement` and `table`, and one per entry of `extra_ffns`.

An extra variant has a placement of its own, and tables that learn by the settings of `table`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pkm_lightning.build.instantiate import instantiate
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.model import Placement

Config = Mapping[str, Any]

#: The name of the variant `ffn`, and the key that holds the others.
MAIN, EXTRAS = "ffn", "extra_ffns"
#: The class that a configuration names where the layers of a pretrained model keep their FFNs.
OWN_FFN = "pkm_lightning.huggingface.PretrainedFFN"
#: Keys of `table` about the rows of `ffn` alone.
_KEYS_OF_ROWS = ("trainable", "path", "tensor")


@dataclass(frozen=True)
class Variant:
    """One FFN variant of a configuration.

    Attributes:
        name: `ffn`, or the key of an entry of `extra_ffns`.
        ffn: class and arguments of the plugin.
        placement: which layers run it, and how.
        table: the settings of its tables.
    """

    name: str
    ffn: Config
    placement: Placement
    table: Config

    @property
    def key(self) -> str:
        """Its place in the configuration: `ffn`, or `extra_ffns.NAME`."""
        return MAIN if self.name == MAIN else f"{EXTRAS}.{self.name}"

    @property
    def layers_key(self) -> str:
        """The key of its layers."""
        return "placement.layers" if self.name == MAIN else f"{self.key}.placement.layers"

    @property
    def class_name(self) -> str:
        """The name of its class, without the module."""
        return str(self.ffn["_target_"]).rpartition(".")[2]

    def layers(self, n_layers: int) -> list[int]:
        """Returns the numbers of its layers, ascending.

        Raises:
            ConfigError: as `Placement.resolve`, naming the variant where it is an extra one.
        """
        with naming(self.name):
            return self.placement.resolve(n_layers)


#: The names of a variant's plugin within a layer, by its mode; `ffn.base` where another variant runs in parallel to it.
_PARTS = {"replace": ("ffn", "ffn.base"), "parallel": ("ffn.variant",), "before": ("before",), "after": ("after",)}


def variants(config: Config) -> list[Variant]:
    """Returns the variants of `config`: `ffn` first, then those of `extra_ffns` by name.

    The order numbers the tables in checkpoints, so that it depends on nothing that a command line may vary.

    Raises:
        ConfigError: as `Placement`, naming the variant where it is an extra one.
    """
    of_config = [Variant(MAIN, config["ffn"], instantiate(config["placement"], "placement"), config["table"])]
    for name, extra in sorted((config.get(EXTRAS) or {}).items()):
        with naming(name):
            placement: Placement = instantiate(extra["placement"], "placement")
            if placement.write_after != 0:
                delay = "null" if placement.write_after is None else placement.write_after
                raise ConfigError(f"placement.write_after={delay} is for ffn alone; set it to 0.")
        of_config.append(Variant(name, extra["ffn"], placement, table_of(config, extra)))
    return of_config


def plugin_variants(config: Config) -> list[Variant]:
    """Returns the variants of which plugins are made: all but the FFN that pretrained layers have anyway.

    Raises:
        ConfigError: as `variants`.
    """
    is_pretrained = "_target_" in config["model"]
    return [v for v in variants(config) if not (is_pretrained and v.ffn.get("_target_") == OWN_FFN)]


def by_place(config: Config) -> dict[tuple[int, str], Variant]:
    """Returns the variants by layer and name of the plugin within it."""
    n_layers = int(config["model"]["n_layers"])
    return {
        (layer, part): variant
        for variant in plugin_variants(config)
        for layer in variant.layers(n_layers)
        for part in _PARTS[variant.placement.mode]
    }


def names_by_place(config: Config) -> dict[tuple[int, str], str]:
    """Returns the names of variants by layer and name of the plugin within it."""
    return {place: variant.name for place, variant in by_place(config).items()}


def table_of(config: Config, extra: Config) -> dict[str, Any]:
    """Returns the settings of the tables of an entry of `extra_ffns`: those of `table`, with its own on top.

    Settings of `table` about the rows of `ffn` themselves do not hold for others. A device of null is that of `table`.
    """
    common = {key: value for key, value in config["table"].items() if key not in _KEYS_OF_ROWS}
    of_extra = dict(extra.get("table") or {})
    if of_extra.get("device") is None:
        of_extra.pop("device", None)
    return {**common, **of_extra}


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Names the extra variant `name` in front of the errors of its parts, whose keys are those of `ffn`."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        if name == MAIN:
            raise
        raise type(error)(f"{EXTRAS}.{name}: {error}") from None
