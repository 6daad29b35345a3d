"""A mode that refuses operators which wait for a device, also on a CPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHost(TorchDispatchMode):
    """Refuses operators for which the host waits: those that return a number or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"), name
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype is torch.bool for i in args[1])
        assert not by_mask, "a bool mask as an index"
        return func(*args, **(kwargs or {}))
