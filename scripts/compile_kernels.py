"""Compiles the Triton kernels of all ops as launches would, without a GPU, and prints what the machine code needs.

    python scripts/compile_kernels.py [--target cuda:90] [--once] [--only half_topk] [--out FILE.csv]

Every op launches its kernels by its own functions, on tensors of the meta device. Triton's launcher derives types,
constants, alignment of pointers and divisibility of sizes from these arguments, as on a GPU, and compiles; only the
launch itself is left out. So this shows what would run, not that it is right.

One line per compiled kernel. `arguments`: types; `/16` marks a pointer or a size that is a multiple of 16, `=1` a size
that is compiled as a constant. For NVIDIA also registers per thread, bytes of local memory per thread (registers that
did not fit), bytes of shared memory, matrix instructions, and for each pointer the widths of its loads and stores in
bits. With `--once` each kernel is compiled for its last launch only, which has odd sizes and so needs every mask.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import torch
import triton
import triton.backends.nvidia
from benchmarks.ptx import access_widths
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import pkm_lightning.ops

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
COLUMNS = (
    "target", "triton", "op", "kernel", "constants", "arguments", "warps", "stages", "registers", "local", "shared",
    "matrix", "loads", "stores",
)  # fmt: skip


class TargetOnly(NamedTuple):
    """What Triton's launcher asks of a driver before it launches."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        """Returns the GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Returns the number under which Triton caches what it compiles."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Returns a stream that is never used."""
        return 0


class Launch(NamedTuple):
    """The arguments of one launch."""

    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def compile(self) -> Any:
        """Compiles what the launch would run, by the launcher itself."""
        return self.kernel.run(*self.arguments, grid=None, warmup=True, **self.keywords)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles all ops, or those that `--only` names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="cuda:90")
    parser.add_argument("--once", action="store_true", help="compile each kernel for its last launch only")
    parser.add_argument("--only", default="", help="the ops whose name contains this")
    parser.add_argument("--out", type=Path, help="write to this file instead of the screen")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by an interpreter; unset it")
    driver.set_active(TargetOnly(TARGETS[options.target]))
    if options.out is None:
        write(sys.stdout, options)
        return
    unfinished = options.out.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        write(file, options)
    unfinished.replace(options.out)


def write(file: TextIO, options: argparse.Namespace) -> None:
    """Writes one line per kernel, each as soon as it is compiled."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    target = TARGETS[options.target]
    for name in kernel_modules():
        op = name.split(".")[-2]
        if options.only in op:
            launches = launches_of(importlib.import_module(name))
            for line in compiled(op, launches, target, once=options.once):
                writer.writerow(line)
                file.flush()


def kernel_modules() -> list[str]:
    """Lists the Triton backends of all ops."""
    modules = pkgutil.walk_packages(pkm_lightning.ops.__path__, "pkm_lightning.ops.")
    return [module.name for module in modules if module.name.endswith(".triton")]


def launches_of(module: ModuleType) -> list[Launch]:
    """Returns the launches of the module's `launch_examples`.

    Raises:
        RuntimeError: the module launches a kernel elsewhere that is not among them.
    """
    launches: list[Launch] = []

    def record(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, arguments, keywords))

    run, JITFunction.run = JITFunction.run, record
    try:
        with torch.device("meta"):
            module.launch_examples()
    finally:
        JITFunction.run = run
    source = inspect.getsource(module)
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    missing = {name for name in kernels if f"{name}[" in source} - {launch.kernel.fn.__name__ for launch in launches}
    if missing:
        raise RuntimeError(f"{module.__name__}: launch_examples does not launch {', '.join(sorted(missing))}.")
    return launches


def compiled(op: str, launches: list[Launch], target: GPUTarget, *, once: bool) -> Iterator[dict[str, object]]:
    """Yields what each launch needs; launches that share their machine code are one line."""
    if once:
        launches = list({launch.kernel.fn.__name__: launch for launch in launches}.values())
    precisions = make_backend(target).parse_options({}).allowed_dot_input_precisions
    done = set()
    for launch in launches:
        if launch.keywords.get("PRECISION", "ieee") not in precisions:
            continue
        kernel = launch.compile()
        if kernel.hash not in done:
            done.add(kernel.hash)
            line = {"target": f"{target.backend} {target.arch}", "triton": triton.__version__, "op": op}
            line |= {"kernel": launch.kernel.fn.__name__, **specialisation(launch.kernel, kernel)}
            yield line | (machine_code(launch.kernel, kernel) if target.backend == "cuda" else {})


def specialisation(function: JITFunction[Any], kernel: Any) -> dict[str, object]:
    """Returns what the launcher has derived from the arguments."""
    types, values, attributes = kernel.src.signature, kernel.src.constants, kernel.src.attrs
    constants, arguments = [], []
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            constants.append(f"{name}={values[place,]}")
        elif types[name] == "constexpr":
            arguments.append(f"{name}={values[place,]}")
        else:
            is_multiple = any(attribute == "tt.divisibility" for attribute, _ in attributes.get((place,), ()))
            arguments.append(f"{name}:{types[name]}{'/16' if is_multiple else ''}")
    return {
        "constants": " ".join(constants),
        "arguments": " ".join(arguments),
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
    }


def machine_code(function: JITFunction[Any], kernel: Any) -> dict[str, object]:
    """Returns what the machine code of a kernel for NVIDIA needs."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    # Constants are no parameters of the machine code.
    types = kernel.src.signature
    parameters = [types[name] and name for name in function.arg_names if types[name] != "constexpr"]
    pointers = {number: name for number, name in enumerate(parameters) if types[name].startswith("*")}
    ptx = kernel.asm["ptx"]
    widths = access_widths(ptx, pointers)
    return {
        "registers": numbers["REG"],
        "local": numbers["LOCAL"] + numbers["STACK"],
        "shared": kernel.metadata.shared,
        "matrix": len(re.findall(r"^\s*(?:@%p\d+\s+)?(?:wgmma\.mma_async|mma\.sync)", ptx, re.MULTILINE)),
        **{kind: " ".join(f"{name}:{'/'.join(map(str, sorted(bits)))}" for name, bits in widths[kind].items())
           for kind in ("loads", "stores")},
    }  # fmt: skip


if __name__ == "__main__":
    main()
