"""The parts that memory plugins share: addressing by product keys, value tables, cures for unread slots."""

from pkm_lightning.memory.addressing import Addressing
from pkm_lightning.memory.cures import Cures
from pkm_lightning.memory.masked_reads import MaskableReads, ReadMask, masked_reads, zero_reads
from pkm_lightning.memory.mesh import TableMesh
from pkm_lightning.memory.product_keys import ProductKeys, half_key_dim, product_slots
from pkm_lightning.memory.quantized_table import QuantizedTable
from pkm_lightning.memory.query import QueryNetwork
from pkm_lightning.memory.row_optimizer import RowOptimizer
from pkm_lightning.memory.row_restriction import restrict_rows
from pkm_lightning.memory.staging import RowStage
from pkm_lightning.memory.table_clipping import clip_tables
from pkm_lightning.memory.table_optimizer import TableOptimizer
from pkm_lightning.memory.table_reference import (
    TableReference,
    check_table,
    count_parameters,
    own_parameters,
    row_learning_tables,
    take_over_tables,
)
from pkm_lightning.memory.tucker_keys import TuckerKeys
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.memory.values import Values

__all__ = [
    "Addressing",
    "Cures",
    "MaskableReads",
    "ProductKeys",
    "QuantizedTable",
    "QueryNetwork",
    "ReadMask",
    "RowOptimizer",
    "RowStage",
    "TableMesh",
    "TableOptimizer",
    "TableReference",
    "TuckerKeys",
    "ValueTable",
    "Values",
    "check_table",
    "clip_tables",
    "count_parameters",
    "half_key_dim",
    "masked_reads",
    "own_parameters",
    "product_slots",
    "restrict_rows",
    "row_learning_tables",
    "take_over_tables",
    "zero_reads",
]
