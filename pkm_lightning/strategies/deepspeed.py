"""DeepSpeed ZeRO for the dense parameters. Tables stay out of its engine, which would gather them whole.

The strategy runs on CPUs over gloo as well, which Lightning's own refuses.
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

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.errors import check_integer
from pkm_lightning.memory import TableOptimizer
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
from pkm_lightning.training.clipping import norm_limit

__all__ = ["DeepSpeed"]


class DeepSpeed(PortableCheckpoints, WatchedRanks, DeepSpeedStrategy):
    """ZeRO 1, 2 or 3 with the optimizer of `optim`, stepped and clipped by the engine.

    Args:
        stage: 1 shards optimizer states, 2 gradients too, 3 parameters too.
        **options: of `lightning.pytorch.strategies.DeepSpeedStrategy`.
    """

    #: See `pkm_lightning.training.engine.Engine`, which this class implements.
    owns_parameters = True
    _groups: list[list[nn.Parameter]]

    def __init__(self, *, stage: int, **options: Any) -> None:
        check_integer("strategy.stage", stage, low=1, high=3)
        # Lightning 2.6 writes into the options, which here belong to the run's configuration.
        super().__init__(stage=stage, **copy.deepcopy(options))
        self._groups = []  # the parameters of each group of the optimizer; filled in training

    def setup_environment(self) -> None:
        """Prepares CPUs without Lightning's refusal and without compiling DeepSpeed's operator for shared memory."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # DeepSpeed chooses its accelerator when it is first imported.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Connects the ranks, on CPUs without Lightning's check of the devices' indices."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """The rank's device. A CPU gets an index, since the engine requires one."""
        if isinstance(self.accelerator, CPUAccelerator):
            return torch.device("cpu", self.local_rank)
        return super().root_device

    @property
    def _language_module(self) -> LanguageModule:
        assert isinstance(self.lightning_module, LanguageModule)
        return self.lightning_module

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Builds the model whole within the block, where Lightning would partition each module as it is constructed."""
        # Modules draw their weights as they are constructed: partitioned ones would draw other weights.
        self._init_config_if_needed()
        yield

    def init_deepspeed(self) -> None:
        """Initialises the engine; names to ZeRO-3 the parameters used outside the forward of their own module."""
        if not self.zero_stage_3:
            super().init_deepspeed()
            return
        from deepspeed.runtime.zero import register_external_parameter
        from deepspeed.utils import set_z3_leaf_modules

        model = self._language_module.model
        kinds = [plugin for _, _, plugin in model.plugins()]
        # ZeRO-3 gathers a module in a hook on its forward, but plugins call parts by other methods: they are leaves.
        if kinds:  # a pretrained model has none, and DeepSpeed refuses an empty list
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
        # The engine writes no clipping as 0.
        self.config.setdefault("gradient_clipping", norm_limit(limit) or 0.0)
        # The engine uses this only to log samples per second.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)
        super()._format_config()

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any | None = None
    ) -> tuple[Any, Optimizer]:
        # The engine will replace the parameters in the groups by flat partitions.
        self._groups = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients that the engine holds. Collective: call on all ranks."""
        for parameter in self._language_module.parameters():
            scale_gradient(parameter, factor)

    def gradient_norm(self) -> Tensor:
        """Returns the L2 norm of the gradients at the end of a step's backward. Collective: call on all ranks."""
        return held_gradient_norm(self.optimizers[0])

    def drop_gradients(self) -> None:
        """Ends the step without an update, as the engine does when gradients overflow."""
        with overflowing(self.optimizers[0]):
            self.deepspeed_engine.step()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the module's state by name; a parameter is whole on one rank, on the meta device on the others."""
        state = super().lightning_module_state_dict()
        for number, (name, parameter) in enumerate(self._language_module.named_parameters()):
            state[name] = self._on_its_writer(number, parameter_value(parameter))
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the states of the engine's optimizer and of the tables', numbered as in a single process."""
        numbers = self._numbers()
        states: dict[int, Any] = {}
        for number, state in zip(numbers, self._engine_state().states(), strict=True):
            states[number] = {
                key: self._on_its_writer(number, value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in state.items()
            }
        engine_groups = inner_optimizer(self.optimizers[0]).param_groups
        groups = [{k: v for k, v in group.items() if k != "params"} for group in engine_groups]
        bounds = [0, *itertools.accumulate(len(group) for group in self._groups)]
        for group, low, high in zip(groups, bounds, bounds[1:], strict=False):
            group["params"] = numbers[low:high]
        table_optimizer = self._language_module.table_optimizer
        if table_optimizer is not None:
            tables = super().optimizer_state(table_optimizer)
            first = self._first_table()
            states |= {number + first: state for number, state in tables["state"].items()}
            for group in tables["param_groups"]:
                groups.append({**group, "params": [number + first for number in group["params"]]})
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder as every strategy does, with the tables' groups added to the schedule."""
        groups = checkpoint["optimizer_states"][0]["param_groups"] if "optimizer_states" in checkpoint else []
        schedules = checkpoint.get("lr_schedulers", [])
        checkpoint["lr_schedulers"] = [self._with_tables(schedule, groups) for schedule in schedules]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _with_tables(self, schedule: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        added = groups[len(schedule["base_lrs"]) :]
        return {
            **schedule,
            "base_lrs": [*schedule["base_lrs"], *(group.get("initial_lr", self._table_rate()) for group in added)],
            "_last_lr": [*schedule["_last_lr"], *(group["lr"] for group in added)],
            "lr_lambdas": [*schedule["lr_lambdas"], *(None for _ in added)],
        }

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads as every strategy does, and reduces the schedule to the engine's groups."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        for schedule in checkpoint.get("lr_schedulers", []) if self._groups else []:
            for key in ("base_lrs", "_last_lr", "lr_lambdas"):
                schedule[key] = schedule[key][: len(self._groups)]
        return checkpoint

    def load_model(self, saved: SavedCheckpoint) -> None:
        """Fills tables and buffers in place, and the engine's parameters one by one. Collective: call on all ranks."""
        parameters = dict(self._language_module.named_parameters())
        rest = {n: v for n, v in PortableCheckpoints.lightning_module_state_dict(self).items() if n not in parameters}
        targets = {f"state_dict.{name}": value for name, value in rest.items()}
        saved.read_into({name: value for name, value in targets.items() if name in saved.shapes})
        for name, parameter in parameters.items():
            if f"state_dict.{name}" not in saved.shapes:
                continue  # the model has gained it since
            dtype = saved.shapes[f"state_dict.{name}"][1]
            # ZeRO-3 leaves an empty tensor in the place of a parameter, with the shape as an attribute.
            value = torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=dtype)
            saved.read_into({f"state_dict.{name}": value})
            set_parameter_value(parameter, value)

    def load_optimizers(self, saved: SavedCheckpoint) -> None:
        """Fills the states of the engine's optimizer and of the tables'. Collective: call on all ranks."""
        self._engine_state().load(saved, self._numbers())
        saved_groups = saved.optimizer(0)["param_groups"]
        for group, written in zip(inner_optimizer(self.optimizers[0]).param_groups, saved_groups, strict=False):
            group.update({key: value for key, value in written.items() if key not in ("params", "name")})
        table_optimizer = self._language_module.table_optimizer
        if table_optimizer is not None:
            load_optimizer(table_optimizer, saved, self._tables().values(), 0, first=self._first_table())

    def _engine_state(self) -> ZeroOptimizerState:
        return ZeroOptimizerState(self.optimizers[0], [p for group in self._groups for p in group])

    def _numbers(self) -> list[int]:
        """Returns the engine's parameters' numbers in the optimizer of a single process, which has the tables too."""
        count = sum(len(group) for group in self._groups)
        first, tables = self._first_table(), self._table_count()
        return [number if number < first else number + tables for number in range(count)]

    def _first_table(self) -> int:
        """Returns the number of the first table in the optimizer of a single process.

        Tables that learn by rows are its last group; others stand first in the group `table`, which is then the last.
        """
        by_rows = isinstance(self._language_module.table_optimizer, TableOptimizer)
        groups = zip(self._groups, inner_optimizer(self.optimizers[0]).param_groups, strict=True)
        return sum(len(parameters) for parameters, group in groups if by_rows or group["name"] != "table")

    def _table_count(self) -> int:
        table_optimizer = self._language_module.table_optimizer
        return 0 if table_optimizer is None else sum(len(group["params"]) for group in table_optimizer.param_groups)

    def _table_rate(self) -> float:
        optim = self._language_module.config["optim"]
        return float(optim["lr"] * optim["table_lr_factor"])

    def _on_its_writer(self, number: int, value: Tensor) -> Tensor:
        """Returns `value` on the rank that writes it, and on the others a tensor of its shape on the meta device."""
        return value.cpu() if number % self.world_size == self.global_rank else value.to("meta")
