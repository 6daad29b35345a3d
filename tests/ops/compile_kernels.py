"""Compiles the Triton kernels of all ops ahead of time, without a GPU: `python compile_kernels.py TARGET [--once]`.

TARGET is a key of `TARGETS`. With `--once` each kernel is compiled for the last of its signatures only, which has odd
sizes and so needs every mask. Run it in a process of its own: under TRITON_INTERPRET there is nothing to compile.
Prints one line per compiled kernel.
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
    """Lists the Triton backends of all ops."""
    modules = pkgutil.walk_packages(pkm_lightning.ops.__path__, "pkm_lightning.ops.")
    return [module.name for module in modules if module.name.endswith(".triton")]


def compile_module(name: str, target: GPUTarget, *, once: bool) -> None:
    """Compiles what the module's `aot_signatures` lists, which must include every kernel that the module launches."""
    module = importlib.import_module(name)
    cases = module.aot_signatures()
    listed = {kernel.fn.__name__ for kernel, _, _ in cases}
    launched = {
        attribute
        for attribute, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and f"{attribute}[" in inspect.getsource(module)
    }
    assert launched <= listed, f"{name} launches {launched - listed}, which aot_signatures does not list"
    if once:
        cases = {kernel.fn.__name__: (kernel, types, constants) for kernel, types, constants in cases}.values()
    for kernel, types, constants in cases:
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
        assert compiled.asm
        print(f"{target.backend} {target.arch} {name} {kernel.fn.__name__} {constants}")


if __name__ == "__main__":
    for module_name in kernel_modules():
        compile_module(module_name, TARGETS[sys.argv[1]], once="--once" in sys.argv)
