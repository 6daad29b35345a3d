"""Reads and writes what DeepSpeed's ZeRO engine holds in flat partitions, one parameter at a time.

It uses DeepSpeed's public functions where there are any (0.19). In saving, parameters and optimizer states are
gathered one after another, and each rank keeps its share of them to write. In loading, every rank reads a parameter
whole and keeps its partition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pkm_lightning.checkpoints import SavedCheckpoint


def parameter_value(parameter: nn.Parameter) -> Tensor:
    """Returns the whole parameter as the engine updates it, in fp32 where the model's copy is narrower.

    Collective: call on all ranks.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if value is not None:
        return value
    with _gathered(parameter):  # frozen, or the engine has no optimizer
        return parameter.detach().clone()


def set_parameter_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets the model's copy and the engine's. Collective: call on all ranks, with the same value."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with _gathered(parameter), torch.no_grad():
        parameter.copy_(value)
    if not parameter.requires_grad:
        return
    if hasattr(parameter, "ds_id"):
        if hasattr(parameter, "_z3_optimizer"):
            safe_set_local_fp32_param(parameter, _partition(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _gathered(parameter: nn.Parameter) -> Any:
    """Returns ZeRO-3's context of a whole parameter, which ends by sending rank 0's value to all; else an empty one."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id"))


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """Returns this rank's partition of `value`, padded as ZeRO-3 pads the last one."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    partition = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(partition, (0, size - partition.numel()))


def scale_gradient(parameter: nn.Parameter, factor: Tensor) -> None:
    """Multiplies the gradient that the engine holds. Collective: call on all ranks."""
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

    if not parameter.requires_grad:
        return
    if hasattr(parameter, "ds_id"):
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)
        return
    grad = safe_get_full_grad(parameter)
    if grad is not None:
        safe_set_full_grad(parameter, grad * factor)


def held_gradient_norm(engine_optimizer: Any) -> Tensor:
    """Returns the L2 norm of the averaged gradients, of which each rank holds a partition. Collective."""
    groups = engine_optimizer.averaged_gradients.values()
    squares = [partition.float().square().sum() for group in groups if group is not None for partition in group]
    square = torch.stack(squares).sum() if squares else torch.zeros(())
    dist.all_reduce(square)
    return square.sqrt() / engine_optimizer.loss_scale


@contextlib.contextmanager
def overflowing(engine_optimizer: Any) -> Iterator[None]:
    """Makes the engine see overflowed gradients within the block, so that its step forgets them without an update."""

    def overflow(**_: Any) -> None:
        engine_optimizer.overflow = True

    # DeepSpeed 0.19: ZeRO-3 calls check_overflow in fp16 only, but the other method in every precision.
    method = "_overflow_check_and_loss_scale_update" if is_stage_3(engine_optimizer) else "check_overflow"
    before = getattr(engine_optimizer, "check_grad_overflow", False)
    engine_optimizer.check_grad_overflow = True
    setattr(engine_optimizer, method, overflow)
    try:
        yield
    finally:
        delattr(engine_optimizer, method)
        engine_optimizer.check_grad_overflow, engine_optimizer.overflow = before, False


def is_stage_3(engine_optimizer: Any) -> bool:
    """Returns whether the engine partitions parameters as well, as ZeRO-3 does."""
    return hasattr(engine_optimizer, "fp32_partitioned_groups_flat")


class ZeroOptimizerState:
    """The states of the torch optimizer that DeepSpeed's optimizer wraps.

    Args:
        engine_optimizer: DeepSpeed's.
        parameters: those that the torch optimizer had before it was wrapped, in its order.
    """

    def __init__(self, engine_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self._outer, self._inner, self._parameters = engine_optimizer, engine_optimizer.optimizer, parameters

    def _flat(self) -> list[Tensor]:
        """Returns the flat partitions that the torch optimizer updates."""
        stage_3 = is_stage_3(self._outer)
        flat: list[Tensor] = (
            self._outer.fp32_partitioned_groups_flat if stage_3 else self._outer.single_partition_of_fp32_groups
        )
        return flat

    def states(self) -> Iterator[dict[str, Any]]:
        """Yields the state of each parameter. Collective: iterate over all of them on all ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        first = self._flat()[0]
        flat_state: Mapping[str, Any] = self._inner.state.get(first, {})
        if flat_state:
            self._link()
        for parameter in self._parameters:
            state = {}
            for key, value in flat_state.items():
                # A state of another shape is one for the whole partition, such as the step.
                whole = isinstance(value, Tensor) and value.shape == first.shape
                state[key] = safe_get_full_optimizer_state(parameter, key) if whole else value
            yield state

    def load(self, saved: SavedCheckpoint, numbers: list[int]) -> None:
        """Fills the states of the parameters, `numbers` in the checkpoint. Collective: call on all ranks."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        shapes = saved.shapes
        prefix, entries = "optimizer_states.0", saved.optimizer(0)["state"]
        for at, (parameter, number) in enumerate(zip(self._parameters, numbers, strict=True)):
            entry = entries.get(number, {})
            names = {key: f"{prefix}.state.{number}.{key}" for key in entry}
            tensors = {n: torch.empty(shapes[n][0], dtype=shapes[n][1]) for n in names.values() if n in shapes}
            saved.read_into(dict(tensors))
            state = {key: tensors.get(name, entry[key]) for key, name in names.items()}
            if at == 0:  # flat states have the keys of the first parameter's
                self._allocate(state)
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.ndim):
                    continue
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, _partition(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _allocate(self, like: Mapping[str, Any]) -> None:
        """Makes states like `like`: the torch optimizer has none before its first step."""
        for flat in self._flat():
            self._inner.state[flat] = {
                key: torch.zeros_like(flat) if isinstance(value, Tensor) and value.ndim else _copied(value)
                for key, value in like.items()
            }
        self._link()

    def _link(self) -> None:
        """Links parameters to their states.

        DeepSpeed 0.19 does so itself under ZeRO-1 and 2, but after the step of the first group, when others have none.
        """
        if hasattr(self._outer, "_lazy_init_hp_params_optimizer_state"):
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def inner_optimizer(engine_optimizer: Any) -> Optimizer:
    """Returns the torch optimizer that DeepSpeed's optimizer wraps."""
    inner: Optimizer = engine_optimizer.optimizer
    return inner
