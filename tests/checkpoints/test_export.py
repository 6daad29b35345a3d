"""Weights as one safetensors file: the bits of the checkpoint, from files and folders, in blocks of rows."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_folders import checkpoint

import pkm_lightning
from pkm_lightning.checkpoints import SavedCheckpoint, export, open_checkpoint
from pkm_lightning.checkpoints.sharded import save
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.save(checkpoint(), tmp_path / "small.ckpt")
    return exported_from(tmp_path / "small.ckpt", tmp_path / "model.safetensors")


def exported_from(path: Path, to: Path) -> Path:
    export.write(SavedCheckpoint(path), to)
    return to


def weights() -> dict[str, torch.Tensor]:
    state = checkpoint()["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items() if name != "heldout"}


def assert_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["file", "rows", "columns"])
def test_every_tensor_has_the_bits_of_the_checkpoint(
    checkpoints: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block_bytes in (1, 3 * 44, 2**26):
        monkeypatch.setattr(export, "_BLOCK_BYTES", block_bytes)
        path = exported_from(checkpoints[kind], tmp_path / "model.safetensors")
        assert_bits(load_file(path), weights())
        exported = open_checkpoint(path).map()["state_dict"]
        assert_bits({name.removeprefix("model."): value for name, value in exported.items()}, weights())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_ranks_write_uneven_chunks(checkpoints: dict[str, Path]) -> None:
    for kind, parts in (("rows", [(19, 11), (18, 11)]), ("columns", [(37, 6), (37, 5)])):
        chunks = SavedCheckpoint(checkpoints[kind]).chunks("state_dict.model.tables.0.weight")
        assert [tuple(chunk.values.shape) for chunk in chunks] == parts


def test_metadata_and_layout_of_an_exported_file(exported: Path) -> None:
    with safe_open(exported, "pt") as file:
        texts = file.metadata()
    saved = checkpoint()
    assert len(texts.pop("pkm_lightning_crc32").split()) == 1 + len(weights())
    assert json.loads(texts.pop("config")) == saved["hyper_parameters"]["config"]
    assert texts == {
        "format": "pt", "pkm_lightning_format": "1", "pkm_lightning_version": pkm_lightning.__version__,
        "tokens_seen": "123", "tokenizer": "digest",
    }  # fmt: skip
    skeleton = open_checkpoint(exported).skeleton
    for name in ("tokens_seen", "tokenizer", "hyper_parameters"):
        assert skeleton[name] == saved[name]
    # The values start at a page, with the largest tensor of the widest items.
    (length,) = struct.unpack("<Q", exported.read_bytes()[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(exported.read_bytes()[8 : 8 + length])
    assert next(name for name, entry in header.items() if entry.get("data_offsets", [1])[0] == 0) == "experts"


def test_a_full_disk_leaves_what_was_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = exported.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for reserves in (True, False):
        if not reserves:
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            with pytest.raises(CheckpointError, match=r"cannot be written \(File too large; it takes .* free the disk"):
                exported_from(exported.with_name("small.ckpt"), exported)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert exported.read_bytes() == before
        assert not exported.with_name("model.safetensors.tmp").exists()


def test_a_folder_with_a_damaged_part_is_refused_and_nothing_is_left(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.ckpt"
    copy.mkdir()
    for part in checkpoints["rows"].iterdir():
        raw = part.read_bytes()
        (copy / part.name).write_bytes(bytes(len(raw)) if part.name == "__1_0.distcp" else raw)
    with pytest.raises(CheckpointError, match=r"copy\.ckpt is damaged \(__1_0\.distcp at byte"):
        exported_from(copy, tmp_path / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy.ckpt"]


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    saved = checkpoint()
    saved["state_dict"]["model.wave"] = torch.ones(2, dtype=torch.complex64)
    torch.save(saved, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"wave \(torch\.complex64\) cannot be exported"):
        exported_from(tmp_path / "odd.ckpt", tmp_path / "model.safetensors")


STREAMED = """
import os, resource, sys, torch
from pathlib import Path
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.export import write
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
write(SavedCheckpoint(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_large_table_goes_through_little_memory(kind: str, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    saved = checkpoint()
    saved["state_dict"]["model.tables.0.weight"] = torch.randn(100_000, 1_000)
    if kind == "file":
        torch.save(saved, tmp_path / "large.ckpt")
    else:
        save(*flatten(saved), tmp_path / "large.ckpt")
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "large.ckpt"), str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 * 2**20
    exported = SavedCheckpoint(tmp_path / "model.safetensors")
    assert exported.shapes["state_dict.model.tables.0.weight"][0] == (100_000, 1_000)
