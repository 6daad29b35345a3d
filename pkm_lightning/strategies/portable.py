"""Checkpoints that any strategy and number of ranks can read, whichever has written them.

A mixin of Lightning's strategies: the state dicts that it composes hold DTensors where ranks hold parts, and loading
fills the model and the optimizers where they are, each rank with its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

from pkm_lightning.checkpoints import SavedCheckpoint, sharded
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError
from pkm_lightning.memory import ValueTable
from pkm_lightning.training.clipping import local


class PortableCheckpoints(ParallelStrategy):
    """Saves and loads folders of `pkm_lightning.checkpoints.sharded`; single files are read as well.

    Attributes:
        asynchronous: write in the background, from a copy in host memory.
    """

    asynchronous = False
    _saver: ThreadPoolExecutor | None = None
    _saving: Future[None] | None = None
    _saving_group: dist.ProcessGroup | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """What is loaded is filled into the model and the optimizers as the strategy has set them up."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` has restored it."""
        return False

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """`load_checkpoint` has restored it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """`load_checkpoint` has restored it."""

    # --- composing

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state by name; what ranks hold in parts as DTensors that share their memory."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        for name, table in self._tables().items():
            state[name] = _whole_table(table, table.weight.detach())
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state as a single process numbers it."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        tables = {id(table.weight): table for table in self._tables().values()}
        for number, parameter in enumerate(_parameters(inner)):
            if id(parameter) in tables and number in state["state"]:
                entries = state["state"][number].items()
                state["state"][number] = {k: _whole_table(tables[id(parameter)], v) for k, v in entries}
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a folder; see `pkm_lightning.checkpoints.sharded.save`."""
        path = Path(self.broadcast(str(filepath)))
        skeleton, tensors = flatten(checkpoint)
        self.finish_saving()
        if not self.asynchronous:
            sharded.save(skeleton, tensors, path)
            return
        if self._saver is None:
            self._saver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            # What the writers tell each other must not stand among the messages of the steps meanwhile.
            self._saving_group = dist.new_group(backend="gloo")
        copies = sharded.snapshot(tensors)
        self._saving = self._saver.submit(sharded.save, skeleton, copies, path, self._saving_group)

    def finish_saving(self) -> None:
        """Waits for the checkpoint that is being written in the background.

        Raises:
            CheckpointError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def teardown(self) -> None:
        """Lets the writer end."""
        if self._saver is not None:
            self._saver.shutdown(wait=True)
            self._saver = None
        super().teardown()

    # --- loading

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills the module, and in training the optimizers; returns the rest of the checkpoint."""
        saved = SavedCheckpoint(checkpoint_path)
        assert self.lightning_module is not None
        names = {name for name in saved.shapes if name.startswith("state_dict.")}
        self._check_names({name.removeprefix("state_dict.") for name in names}, saved)
        self.load_model(saved)
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in saved.skeleton:
            self.load_optimizers(saved)
        return {**saved.read(without=("state_dict", "optimizer_states")), "state_dict": {}, "optimizer_states": []}

    def load_model(self, saved: SavedCheckpoint) -> None:
        """Fills the module's parameters and buffers."""
        state = PortableCheckpoints.lightning_module_state_dict(self)
        saved.read_into({f"state_dict.{name}": value for name, value in state.items()})

    def load_optimizers(self, saved: SavedCheckpoint) -> None:
        """Fills the optimizer's states."""
        for number, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, saved, self._tables().values(), number)

    def _check_names(self, found: set[str], saved: SavedCheckpoint) -> None:
        assert self.lightning_module is not None
        expected = set(self.lightning_module.state_dict())
        if found != expected:
            different = sorted(found ^ expected)
            raise CheckpointError(
                f"ckpt={saved.path} does not fit its configuration ({len(different)} names differ, the first: "
                f"{different[0]})."
            )

    def _tables(self) -> dict[str, ValueTable]:
        """The tables by the names of their weights in the state dict."""
        assert self.lightning_module is not None
        modules = self.lightning_module.named_modules()
        return {f"{name}.weight": module for name, module in modules if isinstance(module, ValueTable)}


def load_optimizer(optimizer: Optimizer, saved: SavedCheckpoint, tables: Any, which: int, first: int = 0) -> None:
    """Fills the states of `optimizer`, whose parameters are numbered from `first` on in the checkpoint.

    Raises:
        CheckpointError: states of other parameters than these.
    """
    inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    by_weight = {id(table.weight): table for table in tables}
    shapes, targets, states = saved.shapes, {}, {}
    section, prefix = saved.optimizer(which), f"optimizer_states.{which}"
    parameters = list(_parameters(inner))
    for number, parameter in enumerate(parameters):
        entries = section["state"].get(number + first, {})
        made = {}
        for key, value in entries.items():
            name = f"{prefix}.state.{number + first}.{key}"
            made[key] = value if name not in shapes else _empty(parameter, by_weight.get(id(parameter)), shapes[name])
            if name in shapes:
                targets[name] = made[key]
        states[number] = {k: local(v) if id(parameter) in by_weight else v for k, v in made.items()}
    saved.read_into(targets)
    groups = _own_groups(section["param_groups"], first, len(parameters))
    try:
        inner.load_state_dict({"state": {n: s for n, s in states.items() if s}, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"ckpt={saved.path} does not fit its configuration ({error})") from None


def _own_groups(groups: list[dict[str, Any]], first: int, count: int) -> list[dict[str, Any]]:
    own = [group for group in groups if first <= group["params"][0] < first + count]
    return [{**group, "params": [number - first for number in group["params"]]} for group in own]


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """In the order by which `state_dict` numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _empty(parameter: Tensor, table: ValueTable | None, shape: tuple[torch.Size, torch.dtype]) -> Tensor:
    """A tensor to read an optimizer's state into, of which this rank holds what it holds of the parameter."""
    size, dtype = shape
    if table is not None and len(size):
        here = table.weight.shape if len(size) == 2 else table.weight.shape[:1]
        return _whole_table(table, torch.empty(here, dtype=dtype, device=table.weight.device))
    if isinstance(parameter, DTensor) and size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _whole_table(table: ValueTable, part: Any) -> Any:
    """The DTensor of which `part` is this rank's: as the weight, or a number a line; anything else as it is."""
    if table.mesh is None or not isinstance(part, Tensor) or part.ndim == 0:
        return part
    return table.mesh.as_dtensor(part, table.n_lines, table.dim // table.slices if part.ndim == 2 else None)
