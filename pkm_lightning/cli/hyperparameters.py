"""The settings of a run that people vary and compare, flat and under short names, for loggers."""

from __future__ import annotations

from typing import Any

from pkm_lightning.build.run import ResolvedRun
from pkm_lightning.usage.slot_readers import find_readers

#: Names for loggers, the same ones whatever the FFN, so that runs make one table; by the key of the configuration.
_KEYS = {
    "dim": "model.dim",
    "n_layers": "model.n_layers",
    "heads": "ffn.heads",
    "knn": "ffn.knn",
    "seq_len": "data.seq_len",
    "global_batch_size": "data.global_batch_size",
    "lr": "optim.lr",
    "table_lr_factor": "optim.table_lr_factor",
    "weight_decay": "optim.weight_decay",
    "schedule": "optim.schedule",
    "max_steps": "trainer.max_steps",
    "precision": "trainer.precision",
    "seed": "seed",
}


def hyperparameters(run: ResolvedRun) -> dict[str, Any]:
    """Returns numbers and texts by name; 0 slots, heads or knn where the FFN has none.

    `slots` is the number of rows or experts that a layer chooses from, the largest if layers differ.
    """
    variants = run.of_variants
    layers = sorted({layer for figures in variants.values() for layer in figures["layers"]})
    return {
        "ffn": " + ".join(figures["class"] for figures in variants.values()),
        "ffn_layers": ",".join(map(str, layers)),
        "slots": max((reader.slots.count for reader in find_readers(run.model).values()), default=0),
        "params_total": run.cost.params_total,
        "params_active": run.cost.params_active,
        "data": str(run.config["data"]["_target_"]).rpartition(".")[2].removesuffix("DataModule"),
        **{name: _plain(_value(run.config, key)) for name, key in _KEYS.items()},
    }


def _value(config: Any, key: str) -> Any:
    """Returns the value of a dotted key, or None."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _plain(value: Any) -> int | float | str:
    return 0 if value is None else value if isinstance(value, int | float | str) else str(value)
