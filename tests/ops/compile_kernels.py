"""Compiles every Triton kernel ahead of time, without a GPU: `python compile_kernels.py cuda:90 [MODULE ...]`.

Run in a process of its own, since under TRITON_INTERPRET there is nothing to compile. Prints a line a kernel.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pkm_lightning.ops

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


def kernel_modules() -> list[str]:
    """The Triton backends of all ops."""
    found = pkgutil.walk_packages(pkm_lightning.ops.__path__, "pkm_lightning.ops.")
    return [module.name for module in found if module.name.endswith(".triton")]


def compile_module(name: str, target: GPUTarget) -> None:
    """Compiles what the module's `aot_signatures` lists."""
    module = importlib.import_module(name)
    listed = {kernel.fn.__name__ for kernel, _, _ in module.aot_signatures()}
    launched = {
        attribute
        for attribute, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and f"{attribute}[" in inspect.getsource(module)
    }
    assert launched <= listed, f"{name} launches {launched - listed}, which aot_signatures does not list"
    for kernel, signature, constants in module.aot_signatures():
        ordered = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(fn=kernel, signature=ordered, constexprs=constants), target=target)
        assert compiled.asm
        print(f"{target.backend} {target.arch} {name} {kernel.fn.__name__} {constants}")


if __name__ == "__main__":
    for module_name in sys.argv[2:] or kernel_modules():
        compile_module(module_name, TARGETS[sys.argv[1]])
