"""Every Triton kernel compiles for the GPUs that the package supports, as its launch would. Compiled, not run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

triton = pytest.importorskip("triton")
FOLDERS = {path.parent.name for path in (ROOT / "pkm_lightning" / "ops").glob("*/triton.py")}

#: Bytes of local memory per thread: none, but the ptxas of Triton 3.6 keeps a 64-bit number of two kernels there.
LOCAL = 8 if triton.__version__.startswith("3.6.") else 0
#: Bounds on the registers per thread. Of 128 registers four blocks of 128 threads fit on a multiprocessor.
REGISTERS = {
    "_gather_sum": 96, "_gather_sum_packed": 96, "_gather_dot": 96, "_copy_rows": 40,
    "_sum_segments": 128, "_sum_pieces": 56, "_join_pieces": 48,
    "_update_rows": 128, "_squares": 128, "_sum_columns": 128,
    # Scores of 64 tokens with 64 keys beside the best lists of all tokens, measured to be faster than smaller tiles.
    "_best_keys": 216, "_query_gradient": 64, "_key_gradient": 56,
    "_combine_rows": 48, "_add_to_halves": 40, "_rank_rows": 96,
    "_convolve": 136, "_gradients": 104,
    "_norm": 64, "_norm_gradients": 128, "_dot": 64, "_dot_gradients": 120,
}  # fmt: skip
#: By kernel the constant that is the width of a row, and the pointers through which it reads or writes tiles of rows.
#: A row that threads have summed together is stored in narrower parts.
ROWS = {
    "_gather_sum": ("V", "table"),
    "_gather_sum_packed": ("V", "table y"),
    "_gather_dot": ("V", "table rows"),
    "_copy_rows": ("V", "table rows"),
    "_sum_segments": ("V", "source_rows out"),
    "_sum_pieces": ("V", "source_rows"),
    "_join_pieces": ("V", ""),
    "_update_rows": ("V", "source_rows table exp_avg exp_avg_sq"),
    "_squares": ("V", "source_rows"),
    "_sum_columns": ("V", "source_rows"),
    "_query_gradient": ("F", "keys_XSF"),
    "_key_gradient": ("F", "q_XTF"),
    "_convolve": ("D", "x"),
    "_gradients": ("D", "grad"),
    "_norm": ("C", "x y"),
    "_norm_gradients": ("C", "x grad x_grad"),
    "_dot": ("C", "x y"),
    "_dot_gradients": ("C", "x y x_grad y_grad"),
}
BITS = {"fp32": 32, "bf16": 16}


def kernels_compiled(cache: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs compile_kernels.py in a process of its own and returns its lines."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    script = ROOT / "scripts" / "compile_kernels.py"
    process = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return list(csv.DictReader(process.stdout.splitlines()))


def ops(lines: list[dict[str, str]]) -> set[str]:
    """Returns the ops whose kernels were compiled."""
    return {line["op"] for line in lines}


def fields(text: str) -> dict[str, str]:
    """Returns what a column lists as `name:value` or `name=value`."""
    return dict(re.split("[:=]", part, maxsplit=1) for part in text.split())  # type: ignore[misc]


@pytest.mark.slow
def test_each_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    assert ops(kernels_compiled(tmp_path, "--once")) == FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_all_launches_compile(target: str, tmp_path: Path) -> None:
    assert ops(kernels_compiled(tmp_path, "--target", target)) == FOLDERS


@pytest.mark.slow
def test_rows_move_as_wide_as_they_are_aligned_and_registers_suffice(tmp_path: Path) -> None:
    lines = kernels_compiled(tmp_path)
    assert ops(lines) == FOLDERS
    for line in lines:
        assert int(line["local"]) <= LOCAL, line
        assert int(line["registers"]) <= REGISTERS[line["kernel"]], line
        # Attributes are those of a launch, in which tensors of torch begin at multiples of 16 bytes.
        types, constants = fields(line["arguments"]), fields(line["constants"])
        assert all(kind.endswith("/16") for kind in types.values() if kind.startswith("*")), line
        # Scores in three products run on the matrix units, IEEE scores do not.
        assert (int(line["matrix"]) > 0) == (constants.get("PRECISION") == "tf32x3"), line
        accesses = {kind: fields(line[kind]) for kind in ("loads", "stores")}
        assert not any("?" in by for by in accesses.values()), line
        if line["kernel"] not in ROWS or line["op"] == "quantized_rows":  # whose rows are codes
            continue
        letter, pointers = ROWS[line["kernel"]]
        width = int(constants[letter])
        for pointer in pointers.split():
            # Rules without moments do not read them.
            widths = [by[pointer] for by in accesses.values() if pointer in by]
            assert widths or pointer.startswith("exp_avg"), (pointer, line)
            # A row begins at a multiple of the largest power of two that divides its bits.
            aligned = (width & -width) * BITS[types[pointer].removeprefix("*").removesuffix("/16")]
            assert set(widths) <= {str(min(128, aligned))}, (pointer, line)
