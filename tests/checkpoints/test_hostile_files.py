"""A checkpoint from a stranger or a failing disk: nothing that it names is run, and no changed bit passes unnoticed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from sharded_folders import checkpoint

from pkm_lightning.checkpoints import SavedCheckpoint, open_checkpoint, safetensors, sharded, sums
from pkm_lightning.checkpoints.atomic import AtomicCheckpointIO
from pkm_lightning.checkpoints.mapped import MappedFile
from pkm_lightning.checkpoints.sums import crc32, seal
from pkm_lightning.checkpoints.tree import flatten
from pkm_lightning.errors import CheckpointError
from pkm_lightning.strategies.portable import PortableCheckpoints


class Bomb:
    """What leaves the file BOOM in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch BOOM",)


#: The same by a path of names through a module whose classes metadata do name.
PATH_BOMB = b"ctorch.distributed.checkpoint.metadata\nos.system\n(Vtouch BOOM\ntR."


def _hidden_bomb(folder: Path) -> None:
    """Puts a bomb into genuine metadata."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Bomb()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _sealed_bomb(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    seal(folder / ".metadata")


def _chunk_bomb(folder: Path) -> None:
    for part in folder.glob("*.distcp"):
        part.write_bytes(pickle.dumps(Bomb()).ljust(part.stat().st_size, b"."))


BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "metadata": ("rows", lambda p: (p / ".metadata").write_bytes(pickle.dumps(Bomb())), "names posix.system"),
    "old pickle": ("rows", lambda p: (p / ".metadata").write_bytes(pickle.dumps(Bomb(), 0)), "names posix.system"),
    "path": ("rows", lambda p: (p / ".metadata").write_bytes(PATH_BOMB), "names torch.*metadata.os.system"),
    "hidden": ("columns", _hidden_bomb, "names posix.system"),
    "sealed": ("columns", _sealed_bomb, "names posix.system"),
    "skeleton": ("rows", lambda p: torch.save(Bomb(), p / "skeleton.pt"), "damaged or no checkpoint"),
    "chunks": ("rows", _chunk_bomb, "distcp"),
    "file": ("file", lambda p: torch.save({**checkpoint(), "loops": Bomb()}, p), "damaged or no checkpoint"),
    "plain pickle": ("file", lambda p: p.write_bytes(pickle.dumps(Bomb())), "damaged or no checkpoint"),
}


def copy_of(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    return copy


@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_that_a_checkpoint_names_is_run(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    form, plant, reason = BOMBS[kind]
    path = copy_of(checkpoints[form], tmp_path)
    plant(path)

    def export(path: Path) -> None:
        saved = SavedCheckpoint(path)
        saved.check_sums()
        saved.read()

    # Lightning passes weights_only=False where a caller asks for it.
    for read in (export, lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False)):
        with pytest.raises(CheckpointError, match=reason):
            read(path)
    assert not (tmp_path / "BOOM").exists()


def _changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


def _place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def _chunk(metadata: Any) -> Any:
    return metadata.state_dict_metadata["state_dict.model.tables.0.weight"].chunks[0]


CONTRADICTIONS: dict[str, tuple[Callable[[Any], object], str]] = {
    "outside": (lambda m: setattr(_place(m), "relative_path", "../0.ckpt"), "'../0.ckpt' is no file of the folder"),
    "absolute": (lambda m: setattr(_place(m), "relative_path", "/etc/passwd"), "is no file of the folder"),
    "compressed": (lambda m: setattr(_place(m), "transform_descriptors", ["zstd"]), "is compressed"),
    "negative": (lambda m: setattr(_place(m), "offset", -1), "is no shape"),
    "too large": (lambda m: setattr(_chunk(m), "sizes", torch.Size([19, 12])), "reaches beyond it"),
    "too small": (lambda m: setattr(_chunk(m), "sizes", torch.Size([18, 11])), "do not make up its shape"),
    "no chunks": (lambda m: m.state_dict_metadata.update({"state_dict.a": 3}), "in the place of a TensorStorage"),
    "no place": (lambda m: m.storage_data.clear(), "inconsistent"),
    "huge": (
        lambda m: (
            setattr(m.state_dict_metadata["state_dict.model.count"], "size", torch.Size([2**50])),
            setattr(m.state_dict_metadata["state_dict.model.count"].chunks[0], "sizes", torch.Size([2**50])),
        ),
        "inconsistent",
    ),
    "not a dict": (lambda m: setattr(m, "storage_data", [1, 2]), "inconsistent"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_metadata_that_contradict_themselves_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    path = copy_of(checkpoints["rows"], tmp_path)
    change, reason = CONTRADICTIONS[kind]
    _changed(change)(path)
    with pytest.raises(CheckpointError, match=rf"\.metadata.*{reason}"):
        open_checkpoint(path)


def test_a_forged_memo_reserves_no_memory(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(checkpoints["rows"], tmp_path)
    # LONG_BINPUT at position 2**32 - 1: pickle.Unpickler would fill 64 GB with zeros.
    (path / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    with pytest.raises(CheckpointError, match=r"\.metadata is inconsistent"):
        open_checkpoint(path)


def _alias_bomb() -> list[Any]:
    layers: list[Any] = ["lol"]
    for _ in range(12):
        layers = [layers] * 10
    return layers


def _cycle() -> list[Any]:
    layers: list[Any] = []
    layers.append(layers)
    return layers


@pytest.mark.parametrize("make", [_alias_bomb, _cycle])
def test_containers_that_never_end_are_refused_at_once(
    checkpoints: dict[str, Path], tmp_path: Path, make: Callable[[], list[Any]]
) -> None:
    saved = checkpoint()
    saved["hyper_parameters"]["config"]["data"]["path"] = make()
    folder = copy_of(checkpoints["rows"], tmp_path)
    for written, path in ((folder / "skeleton.pt", folder), (tmp_path / "file.ckpt", tmp_path / "file.ckpt")):
        torch.save(saved, written)
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            open_checkpoint(path)


def content(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Opens and reads a checkpoint as every verb does."""
    saved = open_checkpoint(path)
    saved.check_sums()
    return flatten(saved.read())


@pytest.mark.parametrize("form", ["file", "exported", "rows"])
def test_no_changed_bit_passes_unnoticed(checkpoints: dict[str, Path], tmp_path: Path, form: str) -> None:
    dice = random.Random(form)
    path = copy_of(checkpoints[form], tmp_path)
    skeleton, tensors = content(path)
    refusals = []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        raw = file.read_bytes()
        for at in dice.sample(range(len(raw)), 80 // len(files)):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << dice.randrange(8))]) + raw[at + 1 :])
            try:
                again, values = content(path)
            except CheckpointError as error:
                refusals.append(str(error))
            else:  # padding and dates of an archive
                assert again == skeleton
                assert all(torch.equal(values[name], value) for name, value in tensors.items()), (file.name, at)
        file.write_bytes(raw)
    assert len(refusals) > 20
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("file", r"file\.ckpt is damaged \(state_dict\.model\.tables\.0\.weight has changed"),
        ("exported", r"model\.safetensors is damaged \(tables\.0\.weight has changed"),
        ("rows", r"0\.ckpt is damaged \(__1_0\.distcp, state_dict\.model\.tables\.0\.weight: .* has changed"),
    ],
)
def test_the_damaged_tensor_is_named_and_others_can_be_read(
    checkpoints: dict[str, Path], tmp_path: Path, form: str, name: str
) -> None:
    path = copy_of(checkpoints[form], tmp_path)
    value = checkpoint()["state_dict"]["model.tables.0.weight"][-1, -1].numpy().tobytes()
    file = path / "__1_0.distcp" if path.is_dir() else path
    raw = file.read_bytes()
    at = raw.index(value)
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    saved = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=name):
        saved.check_sums()
    saved.check_sums(without={"state_dict.model.tables.0.weight"})


def test_another_dtype_in_the_metadata_is_noticed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(checkpoints["rows"], tmp_path)
    raw = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(raw.replace(b"float32", b"float16"))
    with pytest.raises(CheckpointError, match=r"\.metadata has changed since it was written"):
        open_checkpoint(path)


def test_a_rank_refuses_what_another_one_has_read(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = SavedCheckpoint(checkpoints["rows"]), copy_of(checkpoints["rows"], tmp_path)
    for part in path.glob("*.distcp"):
        part.write_bytes(bytes(part.stat().st_size))
    strategy = cast("PortableCheckpoints", SimpleNamespace(global_rank=1, world_size=2))
    PortableCheckpoints._check_sums(strategy, whole)
    with pytest.raises(CheckpointError, match="distcp"):
        PortableCheckpoints._check_sums(strategy, SavedCheckpoint(path))
    monkeypatch.setattr(sharded, "gathered", lambda reason: ["rank 0 has read damage", reason])
    with pytest.raises(CheckpointError, match="rank 0 has read damage"):
        PortableCheckpoints._check_sums(strategy, whole)


def test_ranks_share_the_reading(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counted(file: MappedFile, start: int, length: int) -> int:
        lengths.append(length)
        return crc32(file, start, length)

    for module in (safetensors, sums):
        monkeypatch.setattr(module, "crc32", counted)
    for form in ("file", "exported", "rows"):
        saved = open_checkpoint(checkpoints[form])
        counts = []
        for share in (sums.ALL, sums.Share(0, 2), sums.Share(1, 2)):
            lengths.clear()
            saved.check_sums(share=share)
            counts.append(sum(lengths))
        assert counts[0] == counts[1] + counts[2], form
        assert min(counts) > 0, form


def test_files_of_before_are_opened_without_sums(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = copy_of(checkpoints["rows"], tmp_path)
    raw = (old / ".metadata").read_bytes()
    (old / ".metadata").write_bytes(raw[: raw.index(b"crc32 ")])
    assert content(old)[1].keys() == content(checkpoints["rows"])[1].keys()
    exported = copy_of(checkpoints["exported"], tmp_path)
    raw = exported.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]["pkm_lightning_crc32"]
    text = json.dumps(header).encode()
    exported.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    caplog.set_level("INFO")
    assert content(exported)[1].keys() == content(checkpoints["exported"])[1].keys()
    assert "holds no checksums" in caplog.text
