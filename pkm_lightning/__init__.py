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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of the table below, for editors and type checkers
    from pkm_lightning.build.loading import LoadedModel as LoadedModel
    from pkm_lightning.build.loading import load as load
    from pkm_lightning.build.replacement import FFNReports as FFNReports
    from pkm_lightning.build.replacement import ffn_reports as ffn_reports
    from pkm_lightning.build.replacement import replace_ffn as replace_ffn
    from pkm_lightning.build.saving import save as save
    from pkm_lightning.data.base import NO_TARGET as NO_TARGET
    from pkm_lightning.data.base import RecallItem as RecallItem
    from pkm_lightning.data.datamodule import TokenDataModule as TokenDataModule
    from pkm_lightning.errors import CheckpointError as CheckpointError
    from pkm_lightning.errors import ConfigError as ConfigError
    from pkm_lightning.errors import DataError as DataError
    from pkm_lightning.errors import PkmError as PkmError
    from pkm_lightning.ffn.base import FFNContext as FFNContext
    from pkm_lightning.ffn.base import FFNCost as FFNCost
    from pkm_lightning.ffn.base import FFNOutput as FFNOutput
    from pkm_lightning.ffn.base import Slots as Slots
    from pkm_lightning.ffn.base import TableRead as TableRead
    from pkm_lightning.ffn.base import TableSpec as TableSpec
    from pkm_lightning.ffn.dense import Dense as Dense
    from pkm_lightning.ffn.engram import Engram as Engram
    from pkm_lightning.ffn.memory import Memory as Memory
    from pkm_lightning.ffn.memory_plus import MemoryPlus as MemoryPlus
    from pkm_lightning.ffn.moe import MoE as MoE
    from pkm_lightning.ffn.moe_expert_choice import ExpertChoiceMoE as ExpertChoiceMoE
    from pkm_lightning.ffn.peer import PEER as PEER
    from pkm_lightning.ffn.pkm import PKM as PKM
    from pkm_lightning.ffn.ple import PLE as PLE
    from pkm_lightning.ffn.pretrained_engram import PretrainedEngram as PretrainedEngram
    from pkm_lightning.ffn.stem import STEM as STEM
    from pkm_lightning.ffn.ultramem import UltraMem as UltraMem
    from pkm_lightning.ffn.ultramem_v2 import UltraMemV2 as UltraMemV2
    from pkm_lightning.inference.generation import generate as generate
    from pkm_lightning.inference.sampling import Sampling as Sampling
    from pkm_lightning.memory.quantized_table import QuantizedTable as QuantizedTable
    from pkm_lightning.memory.row_optimizer import RowOptimizer as RowOptimizer
    from pkm_lightning.memory.table_optimizer import TableOptimizer as TableOptimizer
    from pkm_lightning.memory.table_reference import TableReference as TableReference
    from pkm_lightning.memory.table_reference import row_learning_tables as row_learning_tables
    from pkm_lightning.memory.value_table import ValueTable as ValueTable
    from pkm_lightning.model.accounting import ModelCost as ModelCost
    from pkm_lightning.model.accounting import model_cost as model_cost
    from pkm_lightning.model.placement import Placement as Placement
    from pkm_lightning.model.transformer import Transformer as Transformer
    from pkm_lightning.model.trunk import ModelOutput as ModelOutput
    from pkm_lightning.ops.row_update.rules.base import RowRule as RowRule
    from pkm_lightning.training.module import LanguageModule as LanguageModule

__version__ = "0.1.0"

#: Names offered here, and the modules that define them: what a program of your own needs. `docs/python.md` shows them
#: at work. Everything else is reached in the sub-packages.
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
    "FFNReports": "build.replacement",
    "LanguageModule": "training.module",
    "LoadedModel": "build.loading",
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
    "RecallItem": "data.base",
    "RowOptimizer": "memory.row_optimizer",
    "RowRule": "ops.row_update.rules.base",
    "STEM": "ffn.stem",
    "Sampling": "inference.sampling",
    "Slots": "ffn.base",
    "TableOptimizer": "memory.table_optimizer",
    "TableRead": "ffn.base",
    "TableReference": "memory.table_reference",
    "TableSpec": "ffn.base",
    "TokenDataModule": "data.datamodule",
    "Transformer": "model.transformer",
    "UltraMem": "ffn.ultramem",
    "UltraMemV2": "ffn.ultramem_v2",
    "ValueTable": "memory.value_table",
    "ffn_reports": "build.replacement",
    "generate": "inference.generation",
    "load": "build.loading",
    "model_cost": "model.accounting",
    "replace_ffn": "build.replacement",
    "row_learning_tables": "memory.table_reference",
    "save": "build.saving",
}
__all__ = ["__version__", *_OFFERED]


def __getattr__(name: str) -> Any:
    # Imported at first use: they need torch, and a bare `import pkm_lightning` takes a hundredth of a second.
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
