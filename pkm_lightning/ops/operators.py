"""Custom operators, called past torch's dispatcher where nothing has to see them.

Compilers, FLOP counters and fake tensors need an operator with a schema. Everybody else would pay for it: forward and
backward of one take 0.2 ms on a CPU core, those of a Function of autograd a third of that (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

_PLAIN = (Tensor, torch.nn.Parameter)


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
        function, in_graph = self._function, once_differentiable(backward)

        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient
            output = function(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        def apply_backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            # With `create_graph` the gradient of this gradient could be asked for, which `in_graph` refuses.
            return in_graph(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(apply_backward)}
        # The name under which a profiler lists it.
        derived: Any = type(self._name, (torch.autograd.Function,), methods)
        self._differentiable = derived.apply

    def __call__(self, *arguments: Any) -> Any:
        """Computes the operator."""
        if torch.compiler.is_compiling() or not _is_unseen(arguments):
            return self.registered(*arguments)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in arguments if isinstance(x, Tensor))):
            return self._function(*arguments)
        # An operator without a gradient raises an error where somebody asks for it.
        return (self._differentiable or self.registered)(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function below."""
    return lambda function: Operator(name, function)


def _is_unseen(arguments: tuple[Any, ...]) -> bool:
    """Returns whether no mode, transform or tracer would miss the operator, and all tensors have memory."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return not any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in arguments)
