"""Refusals of plugins that break the contract of `pkm_lightning.ffn.base`: one sentence instead of a crash later.

A model on the meta device is checked once, before anything starts (`check_plugins`); the type and the shape of an
output are checked in every forward too, because a plugin need not run on the meta device.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, PkmError, check_range
from pkm_lightning.ffn import (
    FFNContext,
    FFNCost,
    FFNOutput,
    HasAfterStep,
    HasCost,
    HasReads,
    HasSlots,
    Slots,
    TableRead,
)

_log = logging.getLogger(__name__)

CONTRACT = "see pkm_lightning/ffn/base.py"


def checked_output(plugin: nn.Module, x_BTD: Tensor, output: object) -> FFNOutput:
    """Returns the `output` of `plugin` for the input `x_BTD`, if the residual stream can take it.

    Raises:
        ConfigError: not an `FFNOutput`, or a `y_BTD` of another shape or without gradient by its dtype.
    """
    if not isinstance(output, FFNOutput):
        _refuse(plugin, f"forward returned {_kind(output)}; return FFNOutput(y_BTD)")
    # The sum with the residual stream would broadcast (B, T, 1), and cast integers.
    y_BTD = output.y_BTD
    if not _fits(y_BTD, x_BTD):
        _refuse(plugin, f"forward returned y_BTD as {_kind(y_BTD)}; its input is {_kind(x_BTD)}, and so is its output")
    if output.deferred_BTD is not None and not _fits(output.deferred_BTD, x_BTD):
        _refuse(
            plugin,
            f"forward returned deferred_BTD as {_kind(output.deferred_BTD)}; it has the shape of the input, or None",
        )
    return output


def _fits(y_BTD: object, x_BTD: Tensor) -> bool:
    return isinstance(y_BTD, Tensor) and y_BTD.shape == x_BTD.shape and y_BTD.is_floating_point()


def check_plugins(plugins: Iterable[nn.Module], dim: int) -> None:
    """Runs each class of plugin from outside the package once, on the meta device, and checks all that it returns.

    A plugin that cannot run there is left to the first forward. The package's own are held by tests.

    Args:
        plugins: of a model on the meta device, whose dtype is torch's default.
        dim: model dimension D.

    Raises:
        ConfigError: naming the plugin, what it returned, and what the contract asks for.
    """
    checked: set[type] = set()
    for plugin in plugins:
        if type(plugin) in checked or is_own(type(plugin)):
            continue
        checked.add(type(plugin))
        check_signature(plugin)
        plugin_cost(plugin)
        _check_list(plugin, "slots", HasSlots, Slots)
        _check_list(plugin, "reads", HasReads, TableRead)
        _check_forward(plugin, dim)


def plugin_cost(plugin: nn.Module) -> FFNCost | None:
    """Returns what `plugin.cost()` computes, None for a plugin without it.

    Raises:
        ConfigError: the method raised an error, or returned anything but an `FFNCost` of numbers.
    """
    if not isinstance(plugin, HasCost):
        return None
    cost = called(f"{_name(plugin)}.cost()", plugin.cost)
    if not isinstance(cost, FFNCost):
        _refuse(plugin, f"cost() returned {_kind(cost)}; return an FFNCost, or leave the method out")
    for name, value in vars(cost).items():
        if value is not None:
            check_range(f"{_name(plugin)}.cost().{name}", value, 0)
    return cost


def called(what: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Calls code from outside the package.

    Raises:
        ConfigError: naming `what`, the error and its line, in place of any error that is not a sentence already.
    """
    try:
        return function(**arguments)
    except PkmError:
        raise
    except Exception as error:
        raise ConfigError(f"{what} raised {describe_error(error)}.") from error


def describe_error(error: Exception) -> str:
    """Returns kind, text and place of an error in one line: where it was raised outside of torch and this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.') or 'no text'}{place}"


def is_own(cls: type) -> bool:
    """Returns whether a class is of this package, whose tests hold it to its contract."""
    return cls.__module__.partition(".")[0] == "pkm_lightning"


def check_signature(plugin: nn.Module) -> None:
    """Refuses a plugin whose forward does not take what it will be called with.

    Raises:
        ConfigError: naming the plugin and its signature.
    """
    signature = inspect.signature(plugin.forward)
    try:
        signature.bind(None, None)
    except TypeError:
        _refuse(plugin, f"forward takes {signature}; it is called with two, forward(x_BTD, context)")


def _check_forward(plugin: nn.Module, dim: int) -> None:
    dtype = torch.get_default_dtype()
    with torch.device("meta"):
        x_BTD = torch.empty(2, 3, dim, dtype=dtype, requires_grad=True)
        ids_BT = torch.zeros(2, 3, dtype=torch.int64)
        context = FFNContext(ids_BT, observe=True, embedding_BTD=torch.empty_like(x_BTD))
        try:
            returned = plugin(x_BTD, context)
        except PkmError:
            raise
        except Exception as error:
            # Kernels and values that exist on real devices only; a mistake shows itself in the first forward.
            _log.debug("%s does not run on the meta device: %s", _name(plugin), describe_error(error))
            return
    output = checked_output(plugin, x_BTD, returned)
    y_BTD = output.y_BTD
    added = {"y_BTD": y_BTD} if output.deferred_BTD is None else {"y_BTD": y_BTD, "deferred_BTD": output.deferred_BTD}
    for name, value in added.items():
        if torch.promote_types(value.dtype, dtype) is not dtype:
            _refuse(plugin, f"forward returned {name} in {value.dtype} for weights and an input in {dtype}")
    # A plugin may also learn by its own `after_step`.
    learns = any(parameter.requires_grad for parameter in plugin.parameters()) and not isinstance(plugin, HasAfterStep)
    if learns and not any(value.requires_grad for value in added.values()):
        _refuse(plugin, "forward returned a y_BTD without gradient (detached?), so that its parameters cannot learn")
    for field in ("aux_losses", "metrics", "step_stats", "trace"):
        _check_dict(plugin, field, getattr(output, field), scalars=field in ("aux_losses", "metrics"))
    for name, loss in output.aux_losses.items():
        if learns and not loss.requires_grad:  # with weight 0 a plugin may give a constant
            _log.warning("%s: aux_losses['%s'] has no gradient, and changes no weight", _name(plugin), name)


def _check_dict(plugin: nn.Module, field: str, values: object, *, scalars: bool) -> None:
    if not isinstance(values, dict):
        _refuse(plugin, f"forward returned {field} as {_kind(values)}; it is a dict of tensors")
    for name, value in values.items():
        if not isinstance(value, Tensor) or (scalars and (value.ndim or not value.is_floating_point())):
            expected = "a scalar tensor of a floating dtype" if scalars else "a tensor"
            _refuse(plugin, f"forward returned {field}['{name}'] as {_kind(value)}; it is {expected}")


def _check_list(plugin: nn.Module, method: str, protocol: type, kind: type) -> None:
    if not isinstance(plugin, protocol):
        return
    values = called(f"{_name(plugin)}.{method}()", getattr(plugin, method))
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        _refuse(plugin, f"{method}() returned {_kind(values)}; it returns a list of {kind.__name__}")


def _refuse(plugin: nn.Module, what: str) -> NoReturn:
    raise ConfigError(f"the FFN {_name(plugin)} breaks its contract: {what} ({CONTRACT}).")


def _name(plugin: nn.Module) -> str:
    return f"{type(plugin).__module__}.{type(plugin).__name__}"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"
