"""An import hook that checks the annotated shapes in `ops/`, `memory/` and `experts/` at every call under pytest.

Those packages import jaxtyping for type checking only. The hook compiles their modules as if `TYPE_CHECKING` were true
and wraps every function that annotates a shape. jaxtyping's own hook cannot be used: it silently skips annotations
whose names are imported for type checking only, and it wraps Triton kernels, which breaks them. Compiled code is not
cached, so that no other process runs it.

The outcome of a check depends on types, dtypes, shapes and numbers alone, so that calls that agree in these are checked
once: the checks of every call took a sixth of the time of small models. No dimension is an expression of `self`.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, FunctionType, ModuleType

import jaxtyping
import numpy as np
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractDtype, TypeCheckError, jaxtyped

CHECKED = ("pkm_lightning.ops", "pkm_lightning.memory", "pkm_lightning.experts")
_SHAPED = {name for name, kind in vars(jaxtyping).items() if isinstance(kind, type) and issubclass(kind, AbstractDtype)}
_DECORATOR = "_check_shapes"


def check_shapes(function: FunctionType) -> Callable[..., object]:
    """Wraps `function` to check the shapes of its arguments and result, except while torch.compile traces it.

    If the function itself refuses the arguments, its own ValueError is raised, as users would see it.
    """
    results = _Results()

    def computed(*args: object, **kwargs: object) -> object:
        return results.to_check.pop() if results.to_check else function(*args, **kwargs)

    # With the globals of `function`, in which the names of its annotations are looked up.
    wrapped = FunctionType(computed.__code__, function.__globals__, function.__name__, None, computed.__closure__)
    functools.update_wrapper(wrapped, function)
    strict = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))(wrapped)
    passed: dict[Hashable, set[Hashable]] = {}  # of arguments that passed, the results that did

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        known = passed.setdefault((_kind(args), _kind(kwargs)), set())
        try:
            if known:
                result = function(*args, **kwargs)
                if _kind(result) in known:
                    return result
                results.to_check.append(result)
            result = strict(*args, **kwargs)
        except TypeCheckError as mismatch:
            results.to_check.clear()
            _raise_error_of_function(function, args, kwargs)
            raise mismatch from None
        known.add(_kind(result))
        return result

    return checked


class _Results(threading.local):
    """Results that a thread has computed already, and whose shapes alone are to be checked."""

    def __init__(self) -> None:
        self.to_check: list[object] = []


def _kind(value: object) -> Hashable:
    """Returns all of a value that a check can depend on."""
    if isinstance(value, torch.Tensor):
        # A symbolic size is like no other.
        return type(value), value.dtype, *(size if type(size) is int else object() for size in value.shape)
    if isinstance(value, tuple | list):
        return type(value), *map(_kind, value)
    if isinstance(value, Mapping):
        return type(value), *((name, _kind(part)) for name, part in value.items())
    if isinstance(value, np.ndarray):
        return type(value), value.dtype, value.shape
    # An annotation may name a number as a dimension, or one of few texts that are allowed.
    return (type(value), value) if isinstance(value, str | int) else type(value)


def _raise_error_of_function(
    function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Calls the function without checks and raises its ValueError, if any."""
    try:
        function(*args, **kwargs)
    except ValueError:
        raise
    except Exception:  # torch's own error about shapes is less clear than the mismatch that is raised next
        return


class _ShapeChecks(ast.NodeTransformer):
    """A transformer that enables `if TYPE_CHECKING:` blocks and decorates functions that annotate a shape.

    Triton kernels are left alone: Triton compiles the function object itself.
    """

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.test = ast.copy_location(ast.Constant(True), node.test)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        is_kernel = any(ast.unparse(decorator).startswith(("triton.", "jit")) for decorator in node.decorator_list)
        if _annotates_a_shape(node) and not is_kernel:
            node.decorator_list.append(ast.copy_location(ast.Name(_DECORATOR, ast.Load()), node))
        return node


def _annotates_a_shape(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotations = [arg.annotation for arg in arguments if arg.annotation] + ([node.returns] if node.returns else [])
    names = (getattr(part, "id", getattr(part, "attr", None)) for note in annotations for part in ast.walk(note))
    return any(name in _SHAPED for name in names)


class _Loader(SourceFileLoader):
    # SourceFileLoader would read and write `__pycache__` here; overriding `get_code` avoids both.
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _ShapeChecks().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_DECORATOR] = check_shapes
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname == package or fullname.startswith(f"{package}.") for package in self.packages):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(packages: tuple[str, ...] = CHECKED) -> None:
    """Checks the shapes in every module of `packages` that is imported from now on.

    Raises:
        RuntimeError: one of them has been imported already.
    """
    early = [package for package in packages if package in sys.modules]
    if early:
        raise RuntimeError(f"{', '.join(early)} was imported before its shapes could be checked.")
    sys.meta_path.insert(0, _Finder(packages))
