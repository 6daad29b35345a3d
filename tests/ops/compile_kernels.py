"""Compiles the Triton kernels of all ops ahead of time, without a GPU: `python compile_kernels.py TARGET [--once]`.

TARGET is a key of `TARGETS`. With `--once` each kernel is compiled for the last of its signatures only, which has odd
sizes and so needs every mask. Run it in a process of its own: under TRITON_INTERPRET there is nothing to compile.
Prints one line per compiled kernel, as CSV. For NVIDIA it has what the machine code needs: registers per thread, bytes
of local memory per thread (registers that did not fit), bytes of shared memory, and the widest load in bits.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

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
    for kernel, types, sizes in cases:
        # What is no argument of the kernel is an option of its launch, such as the number of warps.
        constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
        options = {name: value for name, value in sizes.items() if name not in constants}
        if (
            constants.get("PRECISION", "ieee")
            not in make_backend(target).parse_options({}).allowed_dot_input_precisions
        ):
            continue
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        # A launch compiles for pointers that are multiples of 16 bytes, as those of torch's tensors are. Without that
        # no load would be wider than one value.
        aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if "*" in kind}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.asm
        elements = " ".join(sorted({kind for kind in types.values() if kind in ("*fp32", "*bf16")}))
        needs = machine_code(compiled) if target.backend == "cuda" else {}
        sizes_text = " ".join(f"{name}={value}" for name, value in sizes.items())
        line = {"target": f"{target.backend} {target.arch}", "module": name, "kernel": kernel.fn.__name__}
        csv.writer(sys.stdout, lineterminator="\n").writerow(
            [*(line | {"sizes": sizes_text, "elements": elements} | needs).values()]
        )


def machine_code(compiled: Any) -> dict[str, int]:
    """Returns what the machine code of a kernel needs, and the widest load of its PTX in bits."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    loads = re.findall(r"ld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bfus](\d+)", compiled.asm["ptx"])
    return {
        "registers": numbers["REG"],
        "local": numbers["LOCAL"] + numbers["STACK"],
        "shared": numbers["SHARED"],
        "widest_load": max((int(vector or 1) * int(bits) for vector, bits in loads), default=0),
    }


if __name__ == "__main__":
    columns = ["target", "module", "kernel", "sizes", "elements", "registers", "local", "shared", "widest_load"]
    csv.writer(sys.stdout, lineterminator="\n").writerow(columns)
    for module_name in kernel_modules():
        compile_module(module_name, TARGETS[sys.argv[1]], once="--once" in sys.argv)
