"""Weights as one safetensors file: the checkpoint's bits, from files and folders, in blocks; or one clear sentence."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_group import Groups
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_folders import checkpoint, save_folders

import pkm_lightning
from pkm_lightning.checkpoints import export
from pkm_lightning.checkpoints.export import WeightSource, map_checkpoint, texts_of, write
from pkm_lightning.checkpoints.safetensors import looks_like_safetensors, read_exported, read_tensors
from pkm_lightning.checkpoints.sharded import flatten, save
from pkm_lightning.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoints(ranks: Groups, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in a file, and in folders that two ranks wrote."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(checkpoint(), folder / "file.ckpt")

    ranks(2).run(save_folders, folder)
    return {"file": folder / "file.ckpt", "rows": folder / "0.ckpt", "columns": folder / "1.ckpt"}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.save(checkpoint(), tmp_path / "small.ckpt")
    return exported_from(tmp_path / "small.ckpt", tmp_path / "model.safetensors")


def exported_from(path: Path, to: Path) -> Path:
    source = WeightSource(path)
    write(source, texts_of(source.rest), to)
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
@pytest.mark.parametrize("block_bytes", [1, 3 * 44, 2**26])
def test_every_tensor_has_the_bits_of_the_checkpoint(
    checkpoints: dict[str, Path], kind: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_BLOCK_BYTES", block_bytes)
    path = exported_from(checkpoints[kind], tmp_path / "model.safetensors")
    assert_bits(load_file(path), weights())
    assert_bits(read_tensors(path)[1], weights())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors"]


def test_the_folders_are_split_unevenly(checkpoints: dict[str, Path]) -> None:
    for kind, parts in (("rows", [(19, 11), (18, 11)]), ("columns", [(37, 6), (37, 5)])):
        chunks = WeightSource(checkpoints[kind])._chunks("tables.0.weight")
        assert [tuple(chunk.values.shape) for chunk in chunks] == parts


def test_the_file_says_what_run_it_is_of(exported: Path) -> None:
    with safe_open(exported, "pt") as file:
        texts = file.metadata()
    saved = checkpoint()
    assert json.loads(texts.pop("config")) == saved["hyper_parameters"]["config"]
    assert texts == {
        "format": "pt", "pkm_lightning_format": "1", "pkm_lightning_version": pkm_lightning.__version__,
        "tokens_seen": "123", "tokenizer": "digest",
    }  # fmt: skip
    again = read_exported(exported)
    assert {k: again[k] for k in ("tokens_seen", "tokenizer", "hyper_parameters")} == {
        k: saved[k] for k in ("tokens_seen", "tokenizer", "hyper_parameters")
    }
    assert "model.tables.0.weight" in again["state_dict"]


def test_the_values_start_at_a_page_with_the_largest_tensor_of_the_widest_items(exported: Path) -> None:
    (length,) = struct.unpack("<Q", exported.read_bytes()[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(exported.read_bytes()[8 : 8 + length])
    assert next(name for name, told in header.items() if told.get("data_offsets", [1])[0] == 0) == "experts"


def test_a_mapped_checkpoint_is_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    assert_bits(map_checkpoint(checkpoints["file"])["state_dict"], checkpoint()["state_dict"])


def header_of(path: Path, change: Any) -> None:
    """Rewrites the header of a file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


DAMAGE = {
    "cut short": (lambda p: os.truncate(p, p.stat().st_size - 1), "bytes instead of"),
    "cut in the header": (lambda p: os.truncate(p, 100), "a header of"),
    "empty": (lambda p: os.truncate(p, 0), "cannot be read"),
    "seven bytes": (lambda p: os.truncate(p, 7), "cut short: 7 bytes"),
    "no JSON": (lambda p: p.write_bytes(p.read_bytes()[:8] + b"[" + p.read_bytes()[9:]), "no JSON"),
    "shape": (lambda p: header_of(p, lambda h: h["experts"].update(shape=[3, 4])), "experts does not lie"),
    "dtype": (lambda p: header_of(p, lambda h: h["experts"].update(dtype="F9")), "unreadable"),
    "a number": (lambda p: header_of(p, lambda h: h.update(experts=3)), "unreadable"),
    "foreign": (lambda p: save_file({"a": torch.ones(2)}, p), "not written by this package"),
    "newer": (lambda p: header_of(p, lambda h: h["__metadata__"].update(pkm_lightning_format="2")), "version 2"),
    "tokens": (lambda p: header_of(p, lambda h: h["__metadata__"].update(tokens_seen="many")), "metadata"),
    "missing": (lambda p: p.unlink(), "does not exist"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_refused_in_one_sentence(exported: Path, how: str) -> None:
    damage, said = DAMAGE[how]
    damage(exported)
    with pytest.raises(CheckpointError, match=said) as refused:
        read_exported(exported)
    assert str(exported) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_safetensors_are_told_from_checkpoints_by_what_is_in_them(exported: Path, tmp_path: Path) -> None:
    renamed = exported.rename(tmp_path / "model.bin")
    assert looks_like_safetensors(renamed)
    assert not looks_like_safetensors(tmp_path / "small.ckpt")
    assert not looks_like_safetensors(tmp_path / "missing.ckpt")


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
from pkm_lightning.checkpoints.export import WeightSource, texts_of, write
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
source = WeightSource(Path(sys.argv[1]))
write(source, texts_of(source.rest), Path(sys.argv[2]))
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
    assert read_tensors(tmp_path / "model.safetensors")[1]["tables.0.weight"].shape == (100_000, 1_000)
