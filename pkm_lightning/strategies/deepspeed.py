"""DeepSpeed ZeRO for the dense parameters; the tables stay out of its engine, which would gather them whole.

Runs on CPUs over gloo too, which Lightning's own strategy refuses.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from pkm_lightning.model.initialisation import plugins
from pkm_lightning.strategies.launcher import WatchedRanks
from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.training import LanguageModule


class DeepSpeed(PortableCheckpoints, WatchedRanks, DeepSpeedStrategy):
    """ZeRO 1, 2 or 3 with the optimizer of `optim`, stepped and clipped by the engine.

    Args:
        stage: 1 shards optimizer states, 2 gradients too, 3 parameters too.
        **options: of `lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    #: The engine takes every registered parameter: tables must not be among them.
    owns_parameters = True

    def __init__(self, *, stage: int, **options: Any) -> None:
        super().__init__(stage=stage, **copy.deepcopy(options))

    def setup_environment(self) -> None:
        """On CPUs without Lightning's refusal and without compiling an operator for shared memory."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """On CPUs without a check of the devices' numbers."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The rank's device; a CPU has a number, which the engine asks for."""
        if isinstance(self.accelerator, CPUAccelerator):
            return torch.device("cpu", self.local_rank)
        return super().root_device

    @property
    def _language_module(self) -> LanguageModule:
        assert isinstance(self.lightning_module, LanguageModule)
        return self.lightning_module

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """The model is built whole and then partitioned: modules draw their weights as they are constructed."""
        self._init_config_if_needed()
        yield

    def init_deepspeed(self) -> None:
        """Tells ZeRO-3 which parameters are used elsewhere than in the forward of the module that owns them."""
        if not self.zero_stage_3:
            super().init_deepspeed()
            return
        from deepspeed.runtime.zero import register_external_parameter
        from deepspeed.utils import set_z3_leaf_modules

        model = self._language_module.model
        kinds = [plugin for block in model.blocks for _, plugin in plugins(block.ffn)]  # type: ignore[arg-type]
        # A plugin's parts are often called by other names than forward: it is gathered as a whole.
        set_z3_leaf_modules(model, sorted({type(module) for module in kinds}, key=str))
        super().init_deepspeed()
        # The loss unembeds after the model's forward.
        for owner in (model.embedding, model.unembedding):
            if owner is not None:
                register_external_parameter(self._language_module, owner.weight)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        limit: float | None = self._language_module.trainer.gradient_clip_val
        if limit is None:
            limit = self._language_module.config["optim"]["clip_norm"]
        self.config.setdefault("gradient_clipping", limit or 0.0)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for the engine's own log only
        super()._format_config()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients that the engine holds."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        for parameter in self._language_module.parameters():
            grad = safe_get_full_grad(parameter) if parameter.requires_grad else None
            if grad is not None:
                safe_set_full_grad(parameter, grad * factor)
