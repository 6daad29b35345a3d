"""A run whose pretrained model has plugins as the folder that `pkm_lightning.huggingface.plugged` loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pkm_lightning.build.variants import Variant, by_place, plugin_variants
from pkm_lightning.checkpoints.companions import PLUGGED_TYPE
from pkm_lightning.errors import CheckpointError
from pkm_lightning.huggingface.folder_keys import PLUGGED_CLASS
from pkm_lightning.memory import TableReference
from pkm_lightning.model import Transformer

#: Before the names of transformers in the weights of a pretrained trunk.
NETWORK = "network."
_TABLE = re.compile(r"tables\.(\d+)\.(.+)")


def check_rows_at_hand(model: Transformer, source: str) -> None:
    """Refuses tables whose rows lie in a file of their own, which the folder would lack.

    Raises:
        CheckpointError: naming the file.
    """
    for table in model.value_tables:
        if table.stored is not None:
            raise CheckpointError(
                f"{source} reads rows of a table in {table.stored.path}, and a folder of format=hf holds all rows; "
                "train with table.trainable=true, which takes them into the checkpoint."
            )


def plugged_config(config: Mapping[str, Any], architecture: Mapping[str, Any], causal_class: str) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
        config: of the run; that of quantised tables where these are.
        architecture: the content of the pretrained model's config.json.
        causal_class: the class in transformers of that model with its unembedding.
    """
    return {
        **architecture,
        "model_type": PLUGGED_TYPE + architecture["model_type"],
        "architectures": [PLUGGED_CLASS + causal_class],
        "pkm_lightning": {"placements": [_entry(config, variant) for variant in _in_order(config)]},
    }


def plugged_names(config: Mapping[str, Any], model: Transformer, weights: Iterable[str]) -> dict[str, str]:
    """Returns the names in the folder of weights.

    Args:
        config: of the run.
        model: on the meta device.
        weights: names as in the model's state dict; of a quantised table those of codes and scales.
    """
    numbers = _table_numbers(config, model)
    names = {}
    for name in weights:
        table = _TABLE.fullmatch(name)
        names[name] = f"value_tables.{numbers[int(table[1])]}.{table[2]}" if table else name.removeprefix(NETWORK)
    return names


def _in_order(config: Mapping[str, Any]) -> list[Variant]:
    """Returns the variants in the order in which a folder lists them: a replacement before what stands beside it."""
    return sorted(plugin_variants(config), key=lambda variant: variant.placement.mode != "replace")


def _entry(config: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    ffn = {key: value for key, value in variant.ffn.items() if not key.startswith("_") or key == "_target_"}
    return {
        "ffn": ffn,
        "layers": variant.layers(int(config["model"]["n_layers"])),
        "mode": variant.placement.mode,
        "shared": bool(variant.table["shared"]),
        "bits": variant.table.get("bits"),
        "tables": "model",
    }


def _table_numbers(config: Mapping[str, Any], model: Transformer) -> dict[int, int]:
    """Returns the number in the folder of each table: variants that come first there have the first ones."""
    present = list(model.tables)
    of_variants: dict[str, list[int]] = {}
    places = by_place(config)
    for layer, name, plugin in model.plugins():
        numbers = of_variants.setdefault(places[layer, name].name, [])
        numbers += [present.index(part.table) for part in plugin.modules() if isinstance(part, TableReference)]
    ordered = [number for variant in _in_order(config) for number in sorted(set(of_variants.get(variant.name, [])))]
    return {number: place for place, number in enumerate(ordered)}
