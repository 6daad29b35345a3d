"""Under pytest the shapes that `ops/`, `memory/` and `experts/` annotate are checked at every call.

Those floors import jaxtyping for type checking only. This hook compiles their modules with the `if TYPE_CHECKING:`
blocks taken and wraps every function that annotates a shape. jaxtyping's own hook cannot do it: it leaves names that
are imported for type checking unresolved, and so unchecked without a word, and it wraps Triton kernels, which breaks
them. Compiled code is not cached, so no other process ever runs it.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractDtype, TypeCheckError, jaxtyped

CHECKED = ("pkm_lightning.ops", "pkm_lightning.memory", "pkm_lightning.experts")
_SHAPED = {name for name, kind in vars(jaxtyping).items() if isinstance(kind, type) and issubclass(kind, AbstractDtype)}
_DECORATOR = "_check_shapes"


def check_shapes(function: Callable[..., object]) -> Callable[..., object]:
    """`function` with arguments and result checked; untouched while torch.compile traces it.

    Where the function refuses such arguments itself, its own ValueError is raised: it is what a user would see.
    """
    strict = jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))(function)

    @functools.wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return strict(*args, **kwargs)
        except TypeCheckError as mismatch:
            _raise_own_refusal(function, args, kwargs)
            raise mismatch from None

    return checked


def _raise_own_refusal(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    try:
        function(*args, **kwargs)
    except ValueError:
        raise
    except Exception:  # whatever torch says of shapes that do not fit; the mismatch says it better
        return


class _ShapeChecks(ast.NodeTransformer):
    """Takes the `if TYPE_CHECKING:` blocks; decorates functions that annotate a shape, except Triton kernels."""

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
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotations = [arg.annotation for arg in every if arg.annotation] + ([node.returns] if node.returns else [])
    names = (getattr(part, "id", getattr(part, "attr", None)) for note in annotations for part in ast.walk(note))
    return any(name in _SHAPED for name in names)


class _Loader(SourceFileLoader):
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
    """Check the shapes of every module of `packages` that is imported from now on."""
    early = [package for package in packages if package in sys.modules]
    if early:
        raise RuntimeError(f"{', '.join(early)} was imported before its shapes could be checked.")
    sys.meta_path.insert(0, _Finder(packages))
