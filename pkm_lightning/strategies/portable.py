"""Checkpoints that every strategy and any number of ranks can read.

A mixin for Lightning's strategies. Its state dicts hold DTensors where ranks hold parts. Loading fills the model and
the optimizers in place, on each rank with its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pkm_lightning.checkpoints import SavedCheckpoint, later_buffers, sharded
from pkm_lightning.checkpoints.sums import Share
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError
from pkm_lightning.memory import ValueTable
from pkm_lightning.ops.ranks import local_shard
from pkm_lightning.ops.row_update import COLUMN_STATE

__all__ = ["PortableCheckpoints"]


class PortableCheckpoints(ParallelStrategy):
    """Mixin for a strategy that writes checkpoint folders and reads checkpoints of every kind.

    Attributes:
        asynchronous: folders are written in the background, from a copy in host memory.
    """

    asynchronous = False
    _saver: ThreadPoolExecutor | None = None
    _saving: Future[None] | None = None
    _saving_group: dist.ProcessGroup | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Loading fills the model and the optimizers as the strategy has set them up, so setup comes first."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning must not restore optimizers: `load_checkpoint` has."""
        return False

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: `load_checkpoint` has filled the model."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: `load_checkpoint` has filled the optimizers."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the module's state by name. Parts of a table are DTensors that share the memory of the weight."""
        assert self.lightning_module is not None
        # FSDP2's parameters are DTensors already; a table holds its part as a plain tensor.
        state = self.lightning_module.state_dict()
        for name, table in self._tables().items():
            state[name] = _whole_table(table, table.weight.detach())
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the optimizer's state, numbered as in a single process."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        tables = {id(table.weight): table for table in self._tables().values()}
        for number, parameter in enumerate(_parameters(inner)):
            if id(parameter) in tables and number in state["state"]:
                entries = state["state"][number].items()
                state["state"][number] = {k: _whole_table(tables[id(parameter)], v, k) for k, v in entries}
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder; see `pkm_lightning.checkpoints.sharded.save`. Collective: call on all ranks."""
        path = Path(self.broadcast(str(filepath)))
        skeleton, tensors = flatten(checkpoint)
        self.finish_saving()  # one folder at a time
        if not self.asynchronous:
            sharded.save(skeleton, tensors, path)
            return
        if self._saver is None:
            self._saver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            # A group of its own: on the default group the writers' collectives would mix with those of the next steps.
            self._saving_group = dist.new_group(backend="gloo")
        copies = sharded.snapshot(tensors)
        self._saving = self._saver.submit(sharded.save, skeleton, copies, path, self._saving_group)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is being written in the background.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def teardown(self) -> None:
        """Waits for the writer in the background to end."""
        if self._saver is not None:
            self._saver.shutdown(wait=True)
            self._saver = None
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills the module, and in training the optimizers. Returns the rest of the checkpoint."""
        saved = SavedCheckpoint(checkpoint_path)
        self._check_sums(saved)
        assert self.lightning_module is not None
        self._check_names(saved)
        self.load_model(saved)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in saved.skeleton:
            self.load_optimizers(saved)
        return {**saved.read(without=("state_dict", "optimizer_states")), "state_dict": {}, "optimizer_states": []}

    def load_model(self, saved: SavedCheckpoint) -> None:
        """Fills the module's parameters and buffers. Collective: call on all ranks."""
        state = PortableCheckpoints.lightning_module_state_dict(self)
        targets = {f"state_dict.{name}": value for name, value in state.items()}
        saved.read_into({name: value for name, value in targets.items() if name in saved.shapes})

    def load_optimizers(self, saved: SavedCheckpoint) -> None:
        """Fills the optimizer's states. Collective: call on all ranks."""
        for number, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, saved, self._tables().values(), number)

    def _check_sums(self, saved: SavedCheckpoint) -> None:
        """Compares the checkpoint to its sums, each rank its share. Collective: call on all ranks."""
        reason = None
        try:
            saved.check_sums(share=Share(self.global_rank, self.world_size))
        except CheckpointError as error:
            reason = str(error)
        # Only one rank reads a damaged part, but all ranks must refuse it.
        reasons = [text for text in sharded.gathered(reason) if text]
        if reasons:
            raise CheckpointError(reasons[0])

    def _check_names(self, saved: SavedCheckpoint) -> None:
        """Refuses other names; shapes are compared by `read_into`, since ZeRO-3's parameters have none."""
        assert self.lightning_module is not None
        module = self.lightning_module
        saved.check_weights(dict.fromkeys(module.state_dict()), later_buffers(module))

    def _tables(self) -> dict[str, ValueTable]:
        """Returns the tables by the names of their weights in the state dict."""
        assert self.lightning_module is not None
        modules = self.lightning_module.named_modules()
        return {
            f"{name}.weight": module
            for name, module in modules
            if isinstance(module, ValueTable) and module.stored is None  # else the rows are in a file of their own
        }


def load_optimizer(
    optimizer: Optimizer, saved: SavedCheckpoint, tables: Iterable[ValueTable], which: int, first: int = 0
) -> None:
    """Fills the states of `optimizer`. Collective: call on all ranks.

    Args:
        optimizer: torch's, or Lightning's around it.
        saved: the checkpoint.
        tables: those whose weights are among the parameters.
        which: the optimizer's number in the checkpoint.
        first: number of its first parameter in the checkpoint.

    Raises:
        CheckpointError: the states are those of other parameters.
    """
    inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    by_weight = {id(table.weight): table for table in tables}
    shapes, targets, states = saved.shapes, {}, {}
    section, prefix = saved.optimizer(which), f"optimizer_states.{which}"
    parameters = list(_parameters(inner))
    for number, parameter in enumerate(parameters):
        state: dict[str, Any] = {}
        for key, value in section["state"].get(number + first, {}).items():
            name = f"{prefix}.state.{number + first}.{key}"
            state[key] = value
            if name in shapes:
                state[key] = targets[name] = _empty(parameter, by_weight.get(id(parameter)), shapes[name], key)
        # The optimizer of a table steps the plain part.
        states[number] = {k: local_shard(v) if id(parameter) in by_weight else v for k, v in state.items()}
    saved.read_into(targets)  # in one collective call for all states
    groups = _groups_of(section["param_groups"], first, len(parameters))
    try:
        inner.load_state_dict({"state": {n: s for n, s in states.items() if s}, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"ckpt={saved.path} does not fit its configuration ({error})") from None


def _groups_of(groups: list[dict[str, Any]], first: int, count: int) -> list[dict[str, Any]]:
    """Returns the groups of parameters `first` to `first + count`, numbered from 0."""
    selected = [group for group in groups if first <= group["params"][0] < first + count]
    return [{**group, "params": [number - first for number in group["params"]]} for group in selected]


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yields parameters in the order in which `state_dict` numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _empty(parameter: Tensor, table: ValueTable | None, shape: tuple[torch.Size, torch.dtype], state: str) -> Tensor:
    """Returns a tensor to read an optimizer's state into, sharded as the parameter is."""
    size, dtype = shape
    if table is not None and len(size):
        rows, columns = table.weight.shape
        part = (rows, columns) if len(size) == 2 else (columns if state.startswith(COLUMN_STATE) else rows,)
        return _whole_table(table, torch.empty(part, dtype=dtype, device=table.weight.device), state)
    if isinstance(parameter, DTensor) and size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _whole_table(table: ValueTable, part: Any, state: str = "") -> Any:
    """Returns the DTensor of which `part` is this rank's: sharded as the weight, or one number per row or column.

    Args:
        table: the table.
        part: its weight or a state of its optimizer; what is no tensor, or no part of one, is returned as it is.
        state: the name of the state.
    """
    if table.mesh is None or not isinstance(part, Tensor) or part.ndim == 0:
        return part
    rows, columns = table.n_lines, table.dim // table.slices
    if part.ndim == 2:
        return table.mesh.as_dtensor(part, rows, columns)
    is_per_column = state.startswith(COLUMN_STATE)
    return table.mesh.as_dtensor(part, None if is_per_column else rows, columns if is_per_column else None)
