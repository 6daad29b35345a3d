"""Tensor operations of sparse memory layers: functions of tensors, without parameters, state or configuration.

Each op has its own folder: `__init__.py` holds the public function, which checks its arguments and chooses a backend;
`reference.py` is a naive implementation for tests; `eager.py`, `cpu.py` and `triton.py` are the backends for training;
README.md has the mathematics. The package needs torch only; numba (CPU) and triton (GPU) make it faster.
"""

from pkm_lightning.ops.causal_convolution import causal_convolution
from pkm_lightning.ops.count_reads import count_reads
from pkm_lightning.ops.gathered_dot import gathered_dot
from pkm_lightning.ops.gathered_rows import gathered_rows
from pkm_lightning.ops.grouped_linear import grouped_linear
from pkm_lightning.ops.half_topk import SCORE_PRECISIONS, half_topk
from pkm_lightning.ops.product_search import product_search
from pkm_lightning.ops.product_topk import MAX_SUB_KEYS, product_combine, product_topk
from pkm_lightning.ops.quantized_rows import (
    QuantizedRows,
    dequantize_rows,
    quantize_rows,
    quantized_dot,
    quantized_gather,
)
from pkm_lightning.ops.ranked_topk import ranked_topk
from pkm_lightning.ops.ranks import sum_over_ranks
from pkm_lightning.ops.rms_norm import rms_norm, rms_norm_dot
from pkm_lightning.ops.rotary import rotary
from pkm_lightning.ops.weighted_gather import weighted_gather

__all__ = [
    "MAX_SUB_KEYS",
    "SCORE_PRECISIONS",
    "QuantizedRows",
    "causal_convolution",
    "count_reads",
    "dequantize_rows",
    "gathered_dot",
    "gathered_rows",
    "grouped_linear",
    "half_topk",
    "product_combine",
    "product_search",
    "product_topk",
    "quantize_rows",
    "quantized_dot",
    "quantized_gather",
    "ranked_topk",
    "rms_norm",
    "rms_norm_dot",
    "rotary",
    "sum_over_ranks",
    "weighted_gather",
]
