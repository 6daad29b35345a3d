"""The benchmarks run, check what they time, and need nothing but torch and triton; no test checks their timings."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tree import ROOT

SCRIPTS = ROOT / "scripts"
# A host with a GPU, the package's sources and nothing installed but torch, triton and what torch itself needs.
BARE = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

FOUND = {"torch", "torchgen", "functorch", "triton", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
         "filelock", "typing_extensions", "pkm_lightning", "benchmarks"}
FOUND |= sys.stdlib_module_names | {path.stem for path in Path(sys.argv[1]).glob("*.py")}

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        known = name.partition(".")[0] in FOUND or name.startswith("_sysconfigdata")
        return PathFinder.find_spec(name, path, target) if known else None

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
import pkm_lightning.memory, pkm_lightning.ops
from benchmarks.important_rows import measure_rows
options = ["--device", "cpu", "--smoke", "--no-memory", "--out", "gpu.csv"]
assert measure_rows("", Path("records.jsonl"), 600, options) == 0
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules} & {"numpy", "numba", "lightning", "hydra"}))
"""


def run(*arguments: str, cwd: Path) -> str:
    """Runs Python with the package and the scripts on its path; returns its output."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script as when it is run: `script("bench_ops")`."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


@pytest.mark.slow
def test_they_need_torch_and_triton_only(tmp_path: Path) -> None:
    assert run("-c", BARE, str(SCRIPTS), cwd=tmp_path).splitlines()[-1] == "imported:"
    results = lines(tmp_path / "gpu.csv")
    assert all(float(line["median_s"]) > 0 for line in results if line["status"] == "ok" and line["rounds"] != "0")
    assert {line["row"][:2] for line in results} > {f"R{number}" for number in range(1, 10)}
    skipped = {line["row"] for line in results if line["status"] != "ok"}
    assert skipped == {"layer, PKM", "layer, PEER", "R7 model in the Trainer"}


@pytest.mark.parametrize(
    ("name", "row", "ways"),
    [
        pytest.param("bench_ops", "layer", 6, marks=pytest.mark.slow),
        pytest.param("bench_train", "R7 model", 5, marks=pytest.mark.slow),
    ],
)
def test_other_packages_and_the_trainer_are_contenders(
    script: Any, tmp_path: Path, name: str, row: str, ways: int
) -> None:
    if name == "bench_ops":
        pytest.importorskip("product_key_memory")
        pytest.importorskip("PEER_pytorch")
    out = tmp_path / f"{name}.csv"
    script(name).main(["--device", "cpu", "--smoke", "--no-memory", "--only", row, "--out", str(out)])
    found = lines(out)
    assert [line["status"] for line in found] == ["ok"] * ways
    assert found[0]["times_faster_than"].endswith(": 1.000")


@pytest.mark.slow
def test_token_tables_are_compared_with_the_embeddings_of_torch(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "token_tables.csv"
    script("bench_token_tables").main(["--smoke", "--only", "V=32", "--cpu-time", "--device", "cpu", "--out", str(out)])
    found = lines(out)
    assert [line["status"] for line in found] == ["ok"] * 8
    assert {line["clock"] for line in found} == {"CPU time"}
    ways = [line for line in found if line["row"] == "token table step, V=32"]
    assert [float(line["error"]) > 0 for line in ways] == [True] * 4  # the table was moved, and compared
    assert ways[0]["times_faster_than"] == "nn.Embedding, clip_grad_norm_, AdamW: 1.000"


@pytest.mark.slow
def test_memory_is_that_of_a_way_alone(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    options = ["--smoke", "--only", "R1 combine", "--out", "ops.csv"]
    printed = run(str(SCRIPTS / "bench_ops.py"), "--device", "cpu", *options, cwd=tmp_path)
    found = lines(tmp_path / "ops.csv")
    assert "peak MiB" in printed
    assert [line["way"] for line in found] == ["textbook", "auto", "eager"]
    assert all(0 <= int(line["peak_bytes"]) < 2**26 for line in found)
    assert all(line["date"] and line["torch"] == torch.__version__ and line["threads"] for line in found)


@pytest.mark.slow
def test_a_wrong_and_a_failing_way_are_not_timed(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol, parts = script("benchmarks.protocol"), script("benchmarks.case")
    monkeypatch.setattr(protocol, "SWEEP_BYTES", 2**16)

    def broken() -> tuple[torch.Tensor]:
        raise RuntimeError("no such kernel")

    ways = {"right": torch.ones, "wrong": torch.zeros, "not finite": lambda n: torch.full((n,), torch.nan)}
    case = parts.Case(
        sizes="3",
        ways=[
            *(parts.Way(name, lambda make=make: lambda: (make(3),)) for name, make in ways.items()),
            parts.Way("broken", lambda: broken),
        ],
        error=lambda run: parts.relative_error(run(), [torch.ones(3)]),
        tolerance=1e-6,
        baselines=["right"],
        memory=False,
    )
    row = parts.Row("row", lambda: case, lambda: case)
    options, _ = protocol.command_line("", ["--device", "cpu", "--rounds", "2"])
    right, wrong, infinite, failed = protocol.results_of(row, options, protocol.stopwatch_of(options))
    assert (right.status, right.rounds, right.same_bits, right.faster) == ("ok", 2, True, {"right": 1.0})
    assert wrong.status == "wrong: relative error 1.0e+00, allowed 1e-06"
    assert infinite.status.startswith("wrong: relative error inf")
    assert failed.status == "RuntimeError: no such kernel"
    assert wrong.median is infinite.median is failed.median is None
    assert [result.has_failed for result in (right, wrong, infinite, failed)] == [False, True, True, True]
    assert "no such kernel" in capsys.readouterr().out


def test_a_benchmark_that_is_stopped_keeps_its_rows(script: Any, tmp_path: Path) -> None:
    protocol, parts = script("benchmarks.protocol"), script("benchmarks.case")

    def stopped() -> Any:
        raise KeyboardInterrupt

    rows = [parts.Row("done", lambda: parts.Skipped("no peer"), stopped), parts.Row("next", stopped, stopped)]
    out = tmp_path / "stopped.csv"
    with pytest.raises(KeyboardInterrupt):
        protocol.benchmark("test", "", lambda _: rows, ["--device", "cpu", "--smoke", "--out", str(out)])
    assert [(line["row"], line["status"]) for line in lines(out)] == [("done", "skipped: no peer")]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_whole_models_write_with_and_without_a_cache(script: Any, tmp_path: Path) -> None:
    out = tmp_path / "generation.csv"
    script("bench_generation").main(["--smoke", "--rounds", "1", "--batches", "2", "--out", str(out)])
    found = lines(out)
    assert [(line["ffn"], line["table"], line["cache"]) for line in found] == [
        *(("dense", "", cache) for cache in ("yes", "no")),
        *(("moe", "", cache) for cache in ("yes", "no")),
        *(("memory_plus", "memory", cache) for cache in ("yes", "no")),
        ("memory_plus", "mapped", "yes"),
    ]
    flops = [int(line["trunk_flops"]) for line in found]
    assert max(flops) < 1.02 * min(flops)
    assert all(float(line["prefill_s"]) > 0 < float(line["decode_s"]) for line in found)


def test_a_mapped_table_decodes_beside_the_same_in_memory(script: Any, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    out = tmp_path / "mmap.csv"
    tiny = ["--sizes", "0.01", "--huge", "0.02", "--rounds", "1", "--seconds", "0.01", "--folder", str(tmp_path)]
    script("bench_mmap").main([*tiny, "--out", str(out)])
    found = lines(out)
    assert [line["way"] for line in found[:4]] == ["memory", "mmap", "mmap", "mmap, readahead"]
    assert len(found) == 10
    assert all(float(line["tokens_s"]) > 0 for line in found[:-1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mmap.csv"]


@pytest.mark.slow
def test_training_beside_a_frozen_table_in_memory_and_in_its_file(script: Any, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    out = tmp_path / "frozen.csv"
    tiny = ["--rows", "50", "--huge", "90", "--dim", "32", "--steps", "4", "--rounds", "1", "--folder", str(tmp_path)]
    module = script("bench_frozen_table")
    module.main([*tiny, "--out", str(out)])
    found = lines(out)
    assert [line["way"] for line in found] == list(module.WAYS)
    assert all(float(line["seconds"]) > 0 < float(line["cpu"]) for line in found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["frozen.csv"]
