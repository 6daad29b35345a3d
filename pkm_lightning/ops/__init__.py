"""Tensors in, tensors out: the operations that a sparse memory is made of.

One folder an op: a public function that chooses the backend, a naive `reference.py`, the faster backends beside it,
and a README.md with the mathematics. Needs nothing but torch (and, for GPU kernels, triton).
"""

from pkm_lightning.ops.count_reads import count_reads
from pkm_lightning.ops.gathered_dot import gathered_dot
from pkm_lightning.ops.grouped_linear import grouped_linear
from pkm_lightning.ops.half_topk import half_topk
from pkm_lightning.ops.product_topk import product_combine, product_topk
from pkm_lightning.ops.ranked_topk import ranked_topk
from pkm_lightning.ops.ranks import sum_over_ranks
from pkm_lightning.ops.weighted_gather import weighted_gather

__all__ = [
    "count_reads",
    "gathered_dot",
    "grouped_linear",
    "half_topk",
    "product_combine",
    "product_topk",
    "ranked_topk",
    "sum_over_ranks",
    "weighted_gather",
]
