"""Evaluation in which ranks run different numbers of forwards, through a model whose forwards need all ranks.

Shards of value tables and of the parameters of FSDP2 and ZeRO are exchanged in every forward: a rank that has finished
must keep taking part until all others have finished.
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
    """Allows each rank to run any number of forwards of `model`. Collective: enter and leave on all ranks.

    Args:
        model: in evaluation mode.
        device: where the model computes.
    """
    if not is_distributed():
        yield
        return

    def any_rank_works(here: bool) -> bool:
        working = torch.tensor(int(here), device=device)
        dist.all_reduce(working)
        return bool(working)

    def announce(*_: Any) -> None:
        any_rank_works(True)

    hook = model.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    # Each turn of this loop answers one announcement, then joins that forward's exchanges with one token of its own.
    one_token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        while any_rank_works(False):
            model.unembed(model(one_token).hidden_BTD)
