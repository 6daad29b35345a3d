"""Fills in what plugins read in files about themselves: sizes, and where the rows of their tables lie."""

from __future__ import annotations

from typing import Any

from pkm_lightning.build.instantiate import target_class
from pkm_lightning.build.variants import EXTRAS, MAIN, naming, plugin_variants


def complete_plugins(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `config` with what plugins with a class method `complete` say about themselves and their tables.

    Raises:
        PkmError: files that are missing, damaged or contradict the configuration.
    """
    model = config["model"]
    completed = dict(config)
    for variant in plugin_variants(config):
        complete = getattr(target_class(variant.ffn, variant.key), "complete", None)
        if complete is None:
            continue
        with naming(variant.name):
            places = variant.layers(int(model["n_layers"]))
            ffn, table = complete(dict(variant.ffn), dict(variant.table), dim=int(model["dim"]), places=places)
        if variant.name == MAIN:
            completed |= {"ffn": ffn, "table": table}
            continue
        extra = config[EXTRAS][variant.name]
        of_extra = extra.get("table") or {}
        settings = {key: table[key] for key in {*of_extra, "path", "tensor"} if key in table}
        if of_extra.get("device") is None:  # it goes on following `table.device`
            settings.pop("device", None)
        completed[EXTRAS] = {**completed[EXTRAS], variant.name: {**extra, "ffn": ffn, "table": settings}}
    return completed
