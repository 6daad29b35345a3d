"""Every Triton kernel compiles for the GPUs that the package supports. Compiled ahead of time, not run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

pytest.importorskip("triton")
FOLDERS = {path.parent.name for path in (ROOT / "pkm_lightning" / "ops").glob("*/triton.py")}


#: Registers per thread up to which two blocks of 128 threads and more fit on a multiprocessor many times over; searches
#: hold whole lists of candidates, convolutions four taps of each output, updates of rows several tiles. Gradients of
#: norms do so too, but launch 16 warps per multiprocessor only, each thread of which may take 128 registers.
_REGISTERS = dict.fromkeys(
    (
        "product_topk", "ranked_topk", "quantized_rows", "causal_convolution", "rms_norm", "row_gradients",
        "row_update",
    ),
    128,
)  # fmt: skip
#: Scores of 64 tokens with 64 keys beside the best lists of all tokens, measured to be faster than smaller tiles.
_REGISTERS["half_topk"] = 208
#: Kernels that read rows of V values, D channels or parts of C values.
_LOOKUPS = {"_gather_sum", "_gather_dot", "_copy_rows", "_update_rows", "_squares", "_sum_segments", "_sum_pieces"}
_LOOKUPS |= {"_join_pieces", "_sum_columns"}
_LOOKUPS |= {"_convolve", "_gradients", "_norm", "_norm_gradients", "_dot", "_dot_gradients"}


def kernels_compiled(cache: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs compile_kernels.py in a process of its own and returns its lines."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    script = ROOT / "tests" / "ops" / "compile_kernels.py"
    process = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return list(csv.DictReader(process.stdout.splitlines()))


def folders(lines: list[dict[str, str]]) -> set[str]:
    """Returns the folders of the ops whose kernels were compiled."""
    return {line["module"].split(".")[-2] for line in lines}


def test_each_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    assert folders(kernels_compiled(tmp_path, "cuda:90", "--once")) == FOLDERS


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_all_signatures_compile(target: str, tmp_path: Path) -> None:
    assert folders(kernels_compiled(tmp_path, target)) == FOLDERS


@pytest.mark.slow
def test_rows_are_loaded_128_bits_wide_and_registers_suffice(tmp_path: Path) -> None:
    lines = kernels_compiled(tmp_path, "cuda:90")
    assert folders(lines) == FOLDERS
    for line in lines:
        bound = _REGISTERS.get(line["module"].split(".")[-2], 80)
        assert int(line["local"]) == 0, line
        assert int(line["registers"]) <= bound, line
        width = re.search(r"\b[VDC]=(\d+)", line["sizes"])
        if line["kernel"] in _LOOKUPS and width and int(width[1]) % 8 == 0:
            assert int(line["widest_load"]) == 128, line
