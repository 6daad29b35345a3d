"""Evaluation whose ranks run different numbers of forwards, through a model whose forwards need all ranks.

Parts of a table, of FSDP2's and of ZeRO's parameters travel in every forward: a rank that has finished must go on
taking part until the last has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pkm_lightning.ops.ranks import is_distributed

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer


@contextlib.contextmanager
def synchronized_forwards(model: Transformer, device: torch.device) -> Iterator[None]:
    """Within it each rank may run as many forwards of `model` as it likes; it ends on all ranks together.

    Args:
        model: not in training; all ranks must enter.
        device: where the model computes.
    """
    if not is_distributed():
        yield
        return

    def somebody_works(here: bool) -> bool:
        working = torch.tensor(int(here), device=device)
        dist.all_reduce(working)
        return bool(working)

    def announce(*_: Any) -> None:
        somebody_works(True)

    hook = model.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    one_token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        while somebody_works(False):
            model.unembed(model(one_token).hidden_BTD)
