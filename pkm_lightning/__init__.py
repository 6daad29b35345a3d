"""Transformers whose feed-forward networks are interchangeable plugins, sparse memory among them.

A tensor carries its shape in its name: `q_BTHK`, `ids_TK`. One letter has one meaning in the whole package; other
letters are local, and the head of their file explains them.

| letter | number of |
|---|---|
| B | sequences in a batch |
| T | tokens of a sequence, or of a batch whose sequences are laid end to end |
| D | values of the model dimension |
| H | heads |
| K | reads per token (of one head where there are several) |
| N | rows of a value table |
| S | sub-keys per half |
| E | experts |
| V | values per row of a value table |
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: Names offered here, and the modules that define them: what a program of your own needs, as `docs/python.md` shows.
#: All else is in the sub-packages. Editors and type checkers read `__init__.pyi`, which a test holds equal to it.
_OFFERED = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dense": "ffn.dense",
    "Engram": "ffn.engram",
    "ExpertChoiceMoE": "ffn.moe_expert_choice",
    "FFNContext": "ffn.base",
    "FFNCost": "ffn.base",
    "FFNOutput": "ffn.base",
    "FFNReports": "build.ffn_reports",
    "LanguageModule": "training.module",
    "LoadedModel": "build.loading",
    "LoopRevival": "usage.loop_revival",
    "Memory": "ffn.memory",
    "MemoryPlus": "ffn.memory_plus",
    "MoE": "ffn.moe",
    "ModelCost": "model.accounting",
    "ModelOutput": "model.trunk",
    "NO_TARGET": "data.base",
    "PEER": "ffn.peer",
    "PKM": "ffn.pkm",
    "PLE": "ffn.ple",
    "PkmError": "errors",
    "Placement": "model.placement",
    "PretrainedEngram": "ffn.pretrained_engram",
    "QuantizedTable": "memory.quantized_table",
    "ReadBackground": "adaptation.background",
    "RecallItem": "data.base",
    "RowOptimizer": "memory.row_optimizer",
    "RowRule": "ops.row_update.rules.base",
    "STEM": "ffn.stem",
    "Sampling": "inference.sampling",
    "Slots": "ffn.base",
    "SparseUpdates": "adaptation.row_updates",
    "TableOptimizer": "memory.table_optimizer",
    "TableRead": "ffn.base",
    "TableReference": "memory.table_reference",
    "TableSpec": "ffn.base",
    "TokenDataModule": "data.datamodule",
    "Transformer": "model.transformer",
    "UltraMem": "ffn.ultramem",
    "UltraMemV2": "ffn.ultramem_v2",
    "ValueTable": "memory.value_table",
    "ablate": "inspection.ablation",
    "ffn_reports": "build.ffn_reports",
    "generate": "inference.generation",
    "load": "build.loading",
    "mask": "inspection.masking",
    "measure_background": "adaptation.background",
    "model_cost": "model.accounting",
    "replace_ffn": "build.replacement",
    "row_learning_tables": "memory.table_reference",
    "save": "build.saving",
    "trace": "inspection.tracing",
}
__all__ = ["__version__", *_OFFERED]


def __getattr__(name: str) -> Any:
    # Imported at first use: they need torch, and a bare `import pkm_lightning` takes a hundredth of a second.
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
