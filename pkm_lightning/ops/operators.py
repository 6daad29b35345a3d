"""Custom operators, called past torch's dispatcher where nothing has to see them.

Compilers, FLOP counters and fake tensors need an operator with a schema. Everybody else would pay for it: forward and
backward of one take 0.2 ms on a CPU core, those of a Function of autograd a third of that (torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_ONCE = b"an operator of this package was asked to differentiate twice; its kernels have first derivatives only"


class Operator:
    """A custom operator without side effects on its arguments; calls take positional arguments.

    Args:
        name: `namespace::name`, under which `torch.ops` has it.
        function: computes it; its annotations are the schema, and its outputs are new tensors.

    Attributes:
        registered: torch's operator, for what else can be registered with it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.registered = library.custom_op(name, function, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._name, self._function = name.rpartition("::")[2], function
        self._differentiable: Callable[..., Any] | None = None

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Registers the gradient, as torch's operators do; it can be computed, but not differentiated in its turn.

        One output has a gradient; `backward` gets None for the others, which `setup_context` marks.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        function, once = self._function, differentiable_once(backward)

        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient
            output = _without_views(function(*arguments))
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        def apply_backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return once(ctx, *grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(apply_backward)}
        # The name under which a profiler lists it.
        derived: Any = type(self._name, (torch.autograd.Function,), methods)
        self._differentiable = derived.apply

    def __call__(self, *arguments: Any) -> Any:
        """Computes the operator."""
        if is_transformed() or not _is_unseen(arguments):
            return self.registered(*arguments)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, Tensor))):
            return self._function(*arguments)
        # An operator without a gradient raises an error where somebody asks for it.
        return (self._differentiable or self.registered)(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function below."""
    return lambda function: Operator(name, function)


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Makes the backward of a Function, which saves its inputs, refuse to be differentiated in its turn.

    torch's `once_differentiable` refuses only where an incoming gradient requires one. That of a sum requires none, and
    a second derivative would silently lack a term.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # nobody can ask for more
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        # Zeros that depend on all that the results depend on, so that whoever differentiates by any of it gets here.
        sources = [x for x in (*ctx.saved_tensors, *grads) if isinstance(x, Tensor) and x.requires_grad]
        zeros = [source.flatten()[:0].sum() for source in sources]
        if not zeros:
            return results
        zero = functools.reduce(torch.add, zeros)
        refuse = cast(Any, torch._C._functions.DelayedError(_ONCE, len(results)))
        return refuse(*(grad if grad is None else grad + zero.to(grad) for grad in results))

    return once


def is_transformed() -> bool:
    """Returns whether a compiler, `torch.func` or forward-mode differentiation needs torch's own operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _without_views(output: Any) -> Any:
    """Returns the outputs as tensors of their own: a view that a Function returns must not be changed in place."""
    if isinstance(output, tuple):
        return tuple(map(_without_views, output))
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _is_unseen(arguments: tuple[Any, ...]) -> bool:
    """Returns whether no mode, transform or tracer would miss the operator, and all tensors have memory."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return not any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in arguments)
