"""Exports with quantised tables: the codes of the rows, from every form of a checkpoint, and models that read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_folders import checkpoint
from tolerances import assert_close
from toys import config

from pkm_lightning.checkpoints import SavedCheckpoint, export, open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.memory import QuantizedTable
from pkm_lightning.ops import QuantizedRows, dequantize_rows, quantize_rows
from pkm_lightning.training import LanguageModule

#: Each plugin that reads tables, with a width.
FFNS = {
    "memory": ("int8", []),
    "memory_plus": ("int4", []),
    "pkm": ("int2", ["ffn.cures.simvq=true"]),
    "peer": ("int4", ["optim.freeze=[tables.*,embedding*]"]),
    "ultramem": ("int8", ["table.learning=dense"]),
    "ultramem_v2": ("int2", ["table=own", "ffn.cores=2"]),
    "engram": ("int8", ["ffn.rows=20"]),
    "ple": ("int4", []),
    "stem": ("int8", []),
}
TABLE = "tables.0.weight"


def saved(path: Path, **changes: Any) -> SavedCheckpoint:
    """Saves the checkpoint of these tests with the configuration of a real model."""
    content = checkpoint()
    content["hyper_parameters"]["config"] = config()
    content["state_dict"].update(changes.pop("state", {}))
    content["hyper_parameters"]["config"].update(changes)
    torch.save(content, path)
    return SavedCheckpoint(path)


@pytest.mark.parametrize("kind", ["file", "rows", "columns", "exported"])
def test_the_file_holds_the_codes_of_every_row(
    checkpoints: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SavedCheckpoint(checkpoints[kind])
    source.skeleton["hyper_parameters"]["config"] = config()
    weight_NV = checkpoint()["state_dict"][f"model.{TABLE}"]
    for block_bytes, (width, bits) in zip((1, 3 * 44, 2**26), {"int8": 8, "int4": 4, "int2": 2}.items(), strict=True):
        monkeypatch.setattr(export, "_BLOCK_BYTES", block_bytes)
        quantized = QuantizedCheckpoint(source, width)
        write(quantized, tmp_path / "model.safetensors")
        found, rows = load_file(tmp_path / "model.safetensors"), quantize_rows(weight_NV, bits)
        assert torch.equal(found.pop("tables.0.codes"), rows.codes_NC)
        assert torch.equal(found.pop("tables.0.scales"), rows.scales_NQ)
        assert quantized.table_bytes == (weight_NV.nbytes, rows.codes_NC.nbytes + rows.scales_NQ.nbytes)
        others = {
            n.removeprefix("state_dict.model."): shape for n, shape in source.shapes.items() if "state_dict.model." in n
        }
        others.pop(TABLE)
        assert {name: (value.shape, value.dtype) for name, value in found.items()} == others
    opened = open_checkpoint(tmp_path / "model.safetensors")
    opened.check_sums()
    assert opened.config["table"] == {
        "_target_": "pkm_lightning.memory.QuantizedTable", "bits": 2, "shared": True, "device": "auto", "shard": "dim",
        "group": "world",
    }  # fmt: skip
    assert opened.config["ffn"] == config()["ffn"]
    assert source.config["table"]["_target_"] == "pkm_lightning.memory.ValueTable"


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.raises(ConfigError, match="quantize='int3' is not known; allowed: int8, int4, int2"):
        QuantizedCheckpoint(saved(path), "int3")
    custom = {**config()["table"], "_target_": "mine.Table"}
    with pytest.raises(
        CheckpointError, match=r"quantize=int4: table\._target_=mine\.Table cannot be quantised, only pkm"
    ):
        QuantizedCheckpoint(saved(path, table=custom), "int4")
    codes = {"_target_": "pkm_lightning.memory.QuantizedTable", "bits": 4}
    with pytest.raises(
        CheckpointError,
        match=r"quantize=int4: the value tables of \S+a\.ckpt have 4 bits per value already; give the run",
    ):
        QuantizedCheckpoint(saved(path, table=codes), "int4")
    plain = saved(path)
    plain.shapes.pop(f"state_dict.model.{TABLE}")
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt has no value table \(pkm_lightning\.ffn\.MemoryPlus reads none\)"
    ):
        QuantizedCheckpoint(plain, "int4")
    weight_NV = checkpoint()["state_dict"][f"model.{TABLE}"]
    weight_NV[5, 2] = torch.inf
    diverged = QuantizedCheckpoint(saved(path, state={f"model.{TABLE}": weight_NV}), "int8")
    with pytest.raises(CheckpointError, match=r"tables\.0\.weight of ckpt=\S+ has a value that is not finite"):
        write(diverged, tmp_path / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


STREAMED = """
import sys
from pathlib import Path
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.checkpoints.quantized import QuantizedCheckpoint
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
write(QuantizedCheckpoint(SavedCheckpoint(sys.argv[1]), "int2"), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.slow
def test_a_large_table_is_quantised_in_little_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    saved(tmp_path / "large.ckpt", state={f"model.{TABLE}": torch.randn(100_000, 1_000)})
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "large.ckpt"), str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 * 2**20


def module(settings: dict[str, Any]) -> LanguageModule:
    made = LanguageModule(settings)
    made.configure_model()
    return made.eval()


@pytest.mark.parametrize("ffn", FFNS)
def test_every_plugin_computes_with_the_values_of_the_codes(ffn: str, tmp_path: Path) -> None:
    width, overrides = FFNS[ffn]
    settings = config(f"ffn={ffn}", *overrides, "model.memory.n_keys=16")
    trained = module(settings)
    content = {"state_dict": trained.state_dict(), "tokens_seen": 0, "hyper_parameters": {"config": settings}}
    torch.save(content, tmp_path / "a.ckpt")
    write(QuantizedCheckpoint(SavedCheckpoint(tmp_path / "a.ckpt"), width), tmp_path / "a.safetensors")
    opened = open_checkpoint(tmp_path / "a.safetensors")
    state = opened.map()["state_dict"]
    for table in trained.model.value_tables:
        rows = quantize_rows(table.weight.detach(), opened.config["table"]["bits"])
        table.weight.data = dequantize_rows(QuantizedRows(*rows))
    batch = {"input_ids": torch.randint(0, 50, (2, 9))}
    with torch.inference_mode():
        expected_BTD = trained(batch).hidden_BTD
        for device in ("auto", "cpu", "mmap"):
            read = module({**opened.config, "table": {**opened.config["table"], "device": device}})
            read.load_state_dict(state)
            tables = read.to("cpu").model.value_tables
            assert len(tables) == len(trained.model.value_tables)
            assert all(isinstance(table, QuantizedTable) for table in tables)
            assert_close(read(batch).hidden_BTD, expected_BTD)
    assert read.cost.table_params == trained.cost.table_params
    assert read.cost.params_total == trained.cost.params_total
    assert read.cost.train_bytes < trained.cost.train_bytes
