"""What DeepSpeed's ZeRO engine holds in flat pieces, parameter by parameter, through its public functions.

Parameters and optimizer states are gathered one after another; each rank keeps every W-th of them to write. In loading
every rank reads a parameter whole and keeps its piece.
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
    """The whole parameter as the engine updates it (fp32 where the model's copy is narrower); all ranks must ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    value: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if value is not None:
        return value
    with _gathered(parameter):  # frozen, or an engine without optimizer
        return parameter.detach().clone()


def set_parameter_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets the model's copy and the engine's; all ranks must call it, with the same value."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with _gathered(parameter), torch.no_grad():
        parameter.copy_(value)
    if not parameter.requires_grad:
        return
    if hasattr(parameter, "ds_id"):
        if hasattr(parameter, "_z3_optimizer"):
            safe_set_local_fp32_param(parameter, _own_piece(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def _gathered(parameter: nn.Parameter) -> Any:
    """ZeRO-3's context of a whole parameter, after which what rank 0 wrote is every rank's; else nothing to do."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id"))


def _own_piece(parameter: Any, value: Tensor) -> Tensor:
    """This rank's piece of `value`, padded as ZeRO-3 pads the last."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    piece = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


def scale_gradient(parameter: nn.Parameter, factor: Tensor) -> None:
    """Multiplies the gradient that the engine holds; all ranks must call it."""
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
    """L2 norm over the ranks' pieces of the averaged gradients; all ranks must ask."""
    held = engine_optimizer.averaged_gradients.values()
    pieces = [piece.float().square().sum() for group in held if group is not None for piece in group]
    square = torch.stack(pieces).sum() if pieces else torch.zeros(())
    dist.all_reduce(square)
    return square.sqrt() / engine_optimizer.loss_scale


@contextlib.contextmanager
def overflowing(engine_optimizer: Any) -> Iterator[None]:
    """Within it the engine takes its gradients for overflowed, and forgets them instead of making a step."""

    def overflow(**_: Any) -> None:
        engine_optimizer.overflow = True

    # ZeRO-3 asks check_overflow in fp16 only; what it calls in every precision is this.
    asked = "_overflow_check_and_loss_scale_update" if is_stage_3(engine_optimizer) else "check_overflow"
    before = getattr(engine_optimizer, "check_grad_overflow", False)
    engine_optimizer.check_grad_overflow = True
    setattr(engine_optimizer, asked, overflow)
    try:
        yield
    finally:
        delattr(engine_optimizer, asked)
        engine_optimizer.check_grad_overflow, engine_optimizer.overflow = before, False


def is_stage_3(engine_optimizer: Any) -> bool:
    """The parameters are in pieces too."""
    return hasattr(engine_optimizer, "fp32_partitioned_groups_flat")


class ZeroOptimizerState:
    """The states of the torch optimizer inside an engine's.

    Args:
        engine_optimizer: DeepSpeed's, around the torch optimizer.
        parameters: of the torch optimizer before the engine took it, in its order.
    """

    def __init__(self, engine_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self._outer, self._inner, self._parameters = engine_optimizer, engine_optimizer.optimizer, parameters

    def _flat(self) -> list[Tensor]:
        """The flat pieces that the torch optimizer steps."""
        stage_3 = is_stage_3(self._outer)
        flat: list[Tensor] = (
            self._outer.fp32_partitioned_groups_flat if stage_3 else self._outer.single_partition_of_fp32_groups
        )
        return flat

    def states(self) -> Iterator[dict[str, Any]]:
        """Each parameter's state; all ranks must go through all of them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        first = self._flat()[0]
        kept: Mapping[str, Any] = self._inner.state.get(first, {})
        if kept:
            self._link()
        for parameter in self._parameters:
            state = {}
            for key, value in kept.items():
                whole = isinstance(value, Tensor) and value.shape == first.shape
                state[key] = safe_get_full_optimizer_state(parameter, key) if whole else value
            yield state

    def load(self, saved: SavedCheckpoint, numbers: list[int]) -> None:
        """Fills the states of the parameters from those that `numbers` name in the checkpoint."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        shapes = saved.shapes
        prefix, entries = "optimizer_states.0", saved.optimizer(0)["state"]
        for at, (parameter, number) in enumerate(zip(self._parameters, numbers, strict=True)):
            own = entries.get(number, {})
            targets = {key: f"{prefix}.state.{number}.{key}" for key in own}
            read = {n: torch.empty(shapes[n][0], dtype=shapes[n][1]) for n in targets.values() if n in shapes}
            saved.read_into(dict(read))
            state = {key: read.get(name, own[key]) for key, name in targets.items()}
            if at == 0:
                self._make_room(state)
            for key, value in state.items():
                if not (isinstance(value, Tensor) and value.ndim):
                    continue
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, _own_piece(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _make_room(self, like: Mapping[str, Any]) -> None:
        """Before its first step the torch optimizer has no states yet."""
        for flat in self._flat():
            self._inner.state[flat] = {
                key: torch.zeros_like(flat) if isinstance(value, Tensor) and value.ndim else _copied(value)
                for key, value in like.items()
            }
        self._link()

    def _link(self) -> None:
        """Lets parameters find their states: ZeRO-1 and 2 do so after the step of the first group, too early."""
        if hasattr(self._outer, "_lazy_init_hp_params_optimizer_state"):
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def inner_optimizer(engine_optimizer: Any) -> Optimizer:
    """The torch optimizer inside."""
    inner: Optimizer = engine_optimizer.optimizer
    return inner
