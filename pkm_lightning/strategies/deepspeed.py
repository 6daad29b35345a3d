"""DeepSpeed ZeRO for the dense parameters; the tables stay out of its engine, which would gather them whole.

Runs on CPUs over gloo too, which Lightning's own strategy refuses.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from pkm_lightning.checkpoints.sharded import SavedTensors
from pkm_lightning.errors import check_integer
from pkm_lightning.memory import TableOptimizer
from pkm_lightning.model.placement import named_plugins
from pkm_lightning.strategies.portable import PortableCheckpoints, load_optimizer
from pkm_lightning.strategies.zero_state import (
    ZeroOptimizerState,
    held_gradient_norm,
    inner_optimizer,
    overflowing,
    parameter_value,
    scale_gradient,
    set_parameter_value,
)
from pkm_lightning.supervision.launcher import WatchedRanks
from pkm_lightning.training import LanguageModule


class DeepSpeed(PortableCheckpoints, WatchedRanks, DeepSpeedStrategy):
    """ZeRO 1, 2 or 3 with the optimizer of `optim`, stepped and clipped by the engine.

    Args:
        stage: 1 shards optimizer states, 2 gradients too, 3 parameters too.
        **options: of `lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    #: The engine takes every registered parameter: tables must not be among them.
    owns_parameters = True
    _groups: list[list[nn.Parameter]]

    def __init__(self, *, stage: int, **options: Any) -> None:
        check_integer("strategy.stage", stage, low=1, high=3)
        super().__init__(stage=stage, **copy.deepcopy(options))
        self._groups = []  # the parameters of the optimizer's groups, in training

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
        kinds = [plugin for block in model.blocks for _, plugin in named_plugins(block.ffn)]  # type: ignore[arg-type]
        # A plugin's parts are often called by other names than forward: it is gathered as a whole.
        set_z3_leaf_modules(model, sorted({type(module) for module in kinds}, key=str))
        super().init_deepspeed()
        tied = model.tied_unembedding
        if tied is not None:
            register_external_parameter(tied, tied.weight)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        limit: float | None = self._language_module.trainer.gradient_clip_val
        if limit is None:
            limit = self._language_module.config["optim"]["clip_norm"]
        self.config.setdefault("gradient_clipping", limit or 0.0)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for the engine's own log only
        super()._format_config()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any | None = None
    ) -> tuple[Any, Optimizer]:
        # The engine replaces the parameters in the groups by its flat pieces.
        self._groups = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients that the engine holds."""
        for parameter in self._language_module.parameters():
            scale_gradient(parameter, factor)

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients that the engine holds at the end of a step's backward; all ranks must ask."""
        return held_gradient_norm(self.optimizers[0])

    def drop_gradients(self) -> None:
        """Ends the step without an update, in the engine's own way: as if gradients had overflowed."""
        with overflowing(self.optimizers[0]):
            self.deepspeed_engine.step()

    # --- checkpoints, in the numbering of a single process: the engine's parameters and the tables in one optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state by name, each parameter whole on one rank and on meta on the others."""
        state = super().lightning_module_state_dict()
        for number, (name, parameter) in enumerate(self._language_module.named_parameters()):
            state[name] = self._shared_out(number, parameter_value(parameter))
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The states of the engine's optimizer and of that of the tables."""
        numbers = self._numbers()
        states: dict[int, Any] = {}
        for number, state in zip(numbers, self._engine_state().states(), strict=True):
            states[number] = {
                key: self._shared_out(number, value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in state.items()
            }
        own = inner_optimizer(self.optimizers[0]).param_groups
        groups = [{k: v for k, v in group.items() if k != "params"} for group in own]
        bounds = [0, *itertools.accumulate(len(group) for group in self._groups)]
        for group, low, high in zip(groups, bounds, bounds[1:], strict=False):
            group["params"] = numbers[low:high]
        apart = self._language_module.table_optimizer
        if apart is not None:
            tables = super().optimizer_state(apart)
            first = self._first_table()
            states |= {number + first: state for number, state in tables["state"].items()}
            for group in tables["param_groups"]:
                groups.append({**group, "params": [number + first for number in group["params"]]})
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """As of every strategy; the schedule names the tables' group too."""
        groups = checkpoint["optimizer_states"][0]["param_groups"] if "optimizer_states" in checkpoint else []
        schedules = checkpoint.get("lr_schedulers", [])
        checkpoint["lr_schedulers"] = [self._with_tables(schedule, groups) for schedule in schedules]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _with_tables(self, schedule: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        apart = groups[len(schedule["base_lrs"]) :]
        return {
            **schedule,
            "base_lrs": [*schedule["base_lrs"], *(group.get("initial_lr", self._table_rate()) for group in apart)],
            "_last_lr": [*schedule["_last_lr"], *(group["lr"] for group in apart)],
            "lr_lambdas": [*schedule["lr_lambdas"], *(None for _ in apart)],
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As of every strategy; the schedule is that of the engine's groups."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        for schedule in checkpoint.get("lr_schedulers", []) if self._groups else []:
            for key in ("base_lrs", "_last_lr", "lr_lambdas"):
                schedule[key] = schedule[key][: len(self._groups)]
        return checkpoint

    def load_model(self, saved: SavedTensors) -> None:
        """Fills tables and buffers as ever, and the engine's parameters one by one."""
        parameters = dict(self._language_module.named_parameters())
        rest = {n: v for n, v in PortableCheckpoints.lightning_module_state_dict(self).items() if n not in parameters}
        saved.read_into({f"state_dict.{name}": value for name, value in rest.items()})
        for name, parameter in parameters.items():
            dtype = saved.shapes[f"state_dict.{name}"][1]
            expected = getattr(parameter, "ds_shape", parameter.shape)
            value = torch.empty(expected, dtype=dtype)
            saved.read_into({f"state_dict.{name}": value})
            set_parameter_value(parameter, value)

    def load_optimizers(self, saved: SavedTensors) -> None:
        """Fills the states of the engine's optimizer and of that of the tables."""
        self._engine_state().load(saved, self._numbers())
        saved_groups = saved.optimizer(0)["param_groups"]
        for group, written in zip(inner_optimizer(self.optimizers[0]).param_groups, saved_groups, strict=False):
            group.update({key: value for key, value in written.items() if key not in ("params", "name")})
        apart = self._language_module.table_optimizer
        if apart is not None:
            tables = self._tables().values()
            load_optimizer(apart, saved, tables, 0, first=self._first_table())

    def _engine_state(self) -> ZeroOptimizerState:
        return ZeroOptimizerState(self.optimizers[0], [p for group in self._groups for p in group])

    def _numbers(self) -> list[int]:
        """The numbers of the engine's parameters where one process's optimizer has the tables too, in their group."""
        count = sum(len(group) for group in self._groups)
        first, tables = self._first_table(), self._table_count()
        return [number if number < first else number + tables for number in range(count)]

    def _first_table(self) -> int:
        """Tables that learn by rows are a last group of their own; others stand first in the group of that role."""
        apart = self._language_module.table_optimizer
        own = inner_optimizer(self.optimizers[0]).param_groups
        counted = [
            len(params)
            for params, group in zip(self._groups, own, strict=True)
            if isinstance(apart, TableOptimizer) or group["name"] != "table"
        ]
        return sum(counted)

    def _table_count(self) -> int:
        apart = self._language_module.table_optimizer
        return 0 if apart is None else sum(len(group["params"]) for group in apart.param_groups)

    def _table_rate(self) -> float:
        optim = self._language_module.config["optim"]
        return float(optim["lr"] * optim["table_lr_factor"])

    def _shared_out(self, number: int, value: Tensor) -> Tensor:
        """`value` on the rank that is to write it; on the others its shape."""
        return value.cpu() if number % self.world_size == self.global_rank else value.to("meta")
