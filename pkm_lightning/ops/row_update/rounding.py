"""Stochastic rounding of fp32 to bf16 by a hash of (seed, place): the same bits on every backend and in every run.

bf16 has 8 significant bits, so that rounding to nearest loses every update below 1/256 of a value. Rounding up with a
probability equal to the part that is cut off keeps such updates on average (Gupta et al. 2015, arXiv 1502.02551,
section 3).

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def hashed_bits(places: Tensor, seed: int) -> Tensor:
    """Returns 32 hashed bits per place as int64: the finaliser of MurmurHash3 (public domain) over place XOR seed."""
    bits = (places ^ seed) & _WORD
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _WORD
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _WORD
    return bits ^ (bits >> 16)


def round_stochastically(values_UV: Tensor, rows_U: Tensor, seed: int) -> Tensor:
    """Returns the fp32 values of the table rows `rows_U` in bf16.

    The place that is hashed is row * V + column, modulo 2**32.
    """
    dim = values_UV.shape[1]
    column_V = torch.arange(dim, device=values_UV.device)
    noise_UV = hashed_bits(rows_U.long().unsqueeze(-1) * dim + column_V, seed) & 0xFFFF
    bits_UV = values_UV.view(torch.int32).long() & _WORD
    rounded_UV = (bits_UV + noise_UV) & 0xFFFF0000
    # torch has no conversion of uint32 bits to int32: values from 2**31 on become negative in two's complement.
    signed_UV = torch.where(rounded_UV >= 2**31, rounded_UV - 2**32, rounded_UV).int()
    # The noise could carry into the sign of a NaN and make it a zero.
    return torch.where(values_UV.isfinite(), signed_UV.view(torch.float32), values_UV).bfloat16()
