"""FSDP2 for the dense parameters: each rank holds a share of each, and its part of the tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule

from pkm_lightning.errors import ConfigError
from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.supervision.launcher import WatchedRanks

__all__ = ["FSDP2"]


class FSDP2(PortableCheckpoints, WatchedRanks, ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with all ranks data-parallel; on CPUs it runs over gloo.

    Args:
        **options: of `lightning.pytorch.strategies.ModelParallelStrategy`, except for the sizes of its mesh.

    Raises:
        ConfigError: the options contain a size of the mesh.
    """

    def __init__(self, **options: Any) -> None:
        sizes = sorted({"data_parallel_size", "tensor_parallel_size"} & options.keys())
        if sizes:
            raise ConfigError(
                f"strategy.{sizes[0]}={options[sizes[0]]} cannot be set: all devices are data-parallel; set devices."
            )
        super().__init__(tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """Sizes the mesh: all ranks are data-parallel."""
        # The number of processes is known only here, after the Trainer has set it.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keeps gradients whole and sends nothing, in all micro-batches of a step but the last."""
        assert self.lightning_module is not None
        units = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)
