"""A pickle of some hundred bytes can describe what takes forever to hash or print: it is refused before."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_folders import checkpoint

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.inert import check_pickle
from pkm_lightning.checkpoints.mapped import DamagedFileError
from pkm_lightning.checkpoints.metadata import _Unpickler, read_metadata

METADATA = "torch.distributed.checkpoint.metadata"
# Each level stores its value in the memo and reads it again: 20 levels have a million leaves.
NESTED = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(20))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def mapping(**values: bytes) -> bytes:
    return b"}" + b"".join(text(key) + value + b"s" for key, value in values.items())


def record(module: str, name: str, state: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b")\x81" + state + b"b"


# Of either kind of file; unguarded, all but the last two are read in full.
HASHED = {
    "key": b"}" + NESTED + b"K\x01s",
    "keys": b"}(" + text("a") + b"K\x01" + NESTED + b"K\x01u",
    "frozen set": b"(" + NESTED + b"\x91",
    "set": b"\x8f(" + NESTED + b"\x90",
    "copies": b"K\x01" + b"2\x86" * 20,
    "byte array": b"\x96" + struct.pack("<Q", 10**7),
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("kind", HASHED)
def test_what_hashes_or_reserves_without_end_is_refused_while_it_is_read(kind: str) -> None:
    content = b"\x80\x04" + HASHED[kind] + b"."
    with pytest.raises((ValueError, KeyError)):
        _Unpickler(io.BytesIO(content)).load()
    with pytest.raises((ValueError, KeyError)):
        check_pickle(content)


CALLED = {
    "set": b"cbuiltins\nset\n](" + NESTED + NESTED + b"e\x85R",
    "repr": NESTED + NESTED + b"\x86)R",
    "state": b"ccollections\nOrderedDict\n)R](" + NESTED + NESTED + b"eb",
    "value": b"}" + text("a") + NESTED + NESTED + b"\x86s",
    "byte array": b"cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R",
    "tensor": b"ctorch\nTensor\nJ\x00\x00\x00\x40\x85R",
    "storage": b"ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x40\x85\x81",
    "deep": b")" + b"\x85" * 100_000,
}


@pytest.mark.parametrize("kind", CALLED)
def test_an_archive_is_refused_before_torch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = tmp_path / "file.ckpt"
    torch.save({"a": 1}, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, b"\x80\x02" + CALLED[kind] + b"." if name.endswith("data.pkl") else content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))
    with pytest.raises(Exception, match="damaged or no checkpoint"):
        open_checkpoint(file)
    file.write_bytes(b"\x80\x02" + CALLED[kind] + b"." + file.read_bytes())
    with pytest.raises(Exception, match="damaged or no checkpoint"):
        open_checkpoint(file)


def _metadata(fqn: bytes, offset: bytes, tensors: bytes = b"}") -> bytes:
    index = record(METADATA, "MetadataIndex", mapping(fqn=fqn, offset=offset))
    place = mapping(relative_path=text("0.distcp"), offset=b"K\x00", length=b"K\x00")
    info = record("torch.distributed.checkpoint.filesystem", "_StorageInfo", place)
    return record(METADATA, "Metadata", mapping(storage_data=b"}" + index + info + b"s", state_dict_metadata=tensors))


ENTRY = record(
    METADATA,
    "TensorStorageMetadata",
    mapping(
        properties=record(METADATA, "TensorProperties", b"(ctorch\nfloat32\nt"), size=b"K\x00\x85", chunks=b"]q\x63"
    ),
)
SHARED = ENTRY.replace(b"]q\x63", b"h\x63")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_metadata(NESTED, b")"), "a tuple stands in the place of a name"),
        (_metadata(text("x"), NESTED), "is no shape"),
        (_metadata(text("x"), b"(" + b"K\x00" * 65 + b"t"), "a tuple is no shape"),
        (
            _metadata(text("x"), b")", b"}" + text("a") + ENTRY + b"s" + text("b") + SHARED + b"s"),
            "'b' shares its chunks",
        ),
    ],
)
def test_metadata_show_no_value_that_may_be_endless(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + content + b".")
    with pytest.raises(DamagedFileError, match=reason) as refusal:
        read_metadata(tmp_path)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        {1, "a"},
        {(1, "a"): b"bytes", torch.device("cpu"): bytearray(b"ab"), 2.5: bytearray()},
        [complex(1, 2), torch.Size([2, 3]), torch.float16, 2**70, None, True],
        OrderedDict(a=Counter("aab"), b=torch.nn.Parameter(torch.ones(2))),
        checkpoint(),
    ],
)
def test_what_torch_saves_and_loads_is_accepted(value: Any) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    with zipfile.ZipFile(file) as archive:
        check_pickle(archive.read("archive/data.pkl"))


def test_a_pickle_of_any_protocol_that_python_writes_is_read() -> None:
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps({"a": [1, 2.5, None, True, "b" * 300, (1, 2)]}, protocol)
        assert _Unpickler(io.BytesIO(content)).load() == pickle.loads(content)
