"""A checkpoint of every kind is opened by one reader, or refused in one sentence that names it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sharded_folders import checkpoint

from pkm_lightning.checkpoints import SavedCheckpoint, latest_checkpoint, open_checkpoint
from pkm_lightning.errors import CheckpointError


@pytest.mark.parametrize("form", ["file", "exported", "rows", "columns"])
def test_all_kinds_have_the_same_content(checkpoints: dict[str, Path], form: str) -> None:
    saved, opened = checkpoint(), open_checkpoint(checkpoints[form])
    assert opened.kind == {"rows": "folder", "columns": "folder"}.get(form, form)
    assert opened.config == saved["hyper_parameters"]["config"]
    assert opened.skeleton["tokens_seen"] == 123
    expected = {n: v for n, v in saved["state_dict"].items() if form != "exported" or n.startswith("model.")}
    for content in (opened.read(), opened.map(without=("optimizer_states",))):
        assert content["state_dict"].keys() == expected.keys()
        assert all(torch.equal(content["state_dict"][name], value) for name, value in expected.items())
    assert ("optimizer_states" in opened.read()) == (form != "exported")
    # What was read belongs to the reader's caller; a mapped tensor would end the process here.
    opened.read()["state_dict"]["model.norm.weight"].zero_()
    assert torch.equal(opened.map()["state_dict"]["model.norm.weight"], expected["model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has the shape \(5,\), here it is \(6,\)"):
        opened.read_into({"state_dict.model.norm.weight": torch.zeros(6)})


def test_the_content_decides_which_kind_a_file_is(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    renamed = shutil.copy(checkpoints["exported"], tmp_path / "model.bin")
    assert open_checkpoint(renamed).kind == "exported"


def test_a_checkpoint_of_another_module_is_opened_only_unchecked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "other.ckpt")
    assert SavedCheckpoint(tmp_path / "other.ckpt").shapes["state_dict.a"] == (torch.Size([2]), torch.float32)
    with pytest.raises(CheckpointError, match="was not written by this package"):
        open_checkpoint(tmp_path / "other.ckpt")


def test_a_name_without_a_tensor_is_damage(tmp_path: Path) -> None:
    torch.save({**checkpoint(), "extra": {"__tensor__": "nowhere"}}, tmp_path / "odd.ckpt")
    for read in (SavedCheckpoint.map, SavedCheckpoint.read):
        with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
            read(open_checkpoint(tmp_path / "odd.ckpt"))


def test_the_latest_checkpoint_has_the_highest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (90, 100, 20):
        (tmp_path / "checkpoints" / f"step-{step:08}.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000110.ckpt.tmp").touch()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000100.ckpt"


def change_header(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def replace_header(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def largest_part(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


#: Form, damage, and the reason that the message gives.
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "cut short": ("exported", lambda p: os.truncate(p, p.stat().st_size - 1), "bytes instead of"),
    "cut in the header": ("exported", lambda p: os.truncate(p, 100), "a header of"),
    "another format": ("exported", lambda p: p.write_bytes(b"# A page\n" * 99), "it has another format"),
    "empty": ("exported", lambda p: os.truncate(p, 0), "damaged or no checkpoint"),
    "seven bytes": ("exported", lambda p: os.truncate(p, 7), "cut short: 7 bytes"),
    "no JSON": ("exported", lambda p: p.write_bytes(p.read_bytes()[:8] + b"[" + p.read_bytes()[9:]), "no JSON"),
    "shape": ("exported", lambda p: change_header(p, lambda h: h["experts"].update(shape=[3, 4])), "experts does not"),
    "dtype": ("exported", lambda p: change_header(p, lambda h: h["experts"].update(dtype="F9")), "unreadable"),
    "a number": ("exported", lambda p: change_header(p, lambda h: h.update(experts=3)), "unreadable"),
    "foreign": ("exported", lambda p: save_file({"a": torch.ones(2)}, p), "was not written by this package"),
    "newer": (
        "exported",
        lambda p: change_header(p, lambda h: h["__metadata__"].update(pkm_lightning_format="2")),
        "version 2",
    ),
    "tokens": (
        "exported",
        lambda p: change_header(p, lambda h: h["__metadata__"].update(tokens_seen="many")),
        "metadata",
    ),
    **{
        f"header {name}": (
            "exported",
            lambda p, change=change: change_header(p, lambda h: h["experts"].update(change)),
            "header is unreadable|does not lie",
        )
        for name, change in {
            "infinite shape": {"shape": [float("inf")]},
            "nan shape": {"shape": [float("nan")]},
            "infinite offset": {"data_offsets": [0, float("inf")]},
            "fractions": {"shape": [3.0, 4, 5]},
            "truth values": {"shape": [True, 60]},
            "2**62": {"shape": [2**62], "data_offsets": [0, 2**65]},
            "2**62 of nothing": {"shape": [2**62, 8, 0], "data_offsets": [0, 0]},
            "5,000 digits": {"shape": [10**4000]},
            "negative": {"shape": [-3, -4, 5]},
            "many dimensions": {"shape": [1] * 70},
            "overlap": {"data_offsets": [8, 488]},
            "texts": {"shape": "345"},
            "no fields": {"data_offsets": []},
        }.items()
    },
    "header deep": ("exported", lambda p: replace_header(p, b'{"a":' + b"[" * 100_000), "unreadable|no JSON"),
    "name twice": ("exported", lambda p: replace_header(p, b'{"a":1,"a":1}'), "a name twice"),
    "missing": ("exported", lambda p: p.unlink(), "does not exist"),
    "archive cut short": ("file", lambda p: os.truncate(p, p.stat().st_size // 2), "damaged or no checkpoint"),
    "text": ("file", lambda p: p.write_text("model: {}"), "damaged or no checkpoint"),
    "part cut short": ("rows", lambda p: os.truncate(largest_part(p), 100), r"distcp is cut short"),
    "part missing": ("rows", lambda p: largest_part(p).unlink(), r"distcp is missing or no file"),
    "no skeleton": ("rows", lambda p: (p / "skeleton.pt").unlink(), "damaged or no checkpoint"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(
    checkpoints: dict[str, Path], tmp_path: Path, how: str
) -> None:
    form, damage, reason = DAMAGE[how]
    path = tmp_path / checkpoints[form].name
    (shutil.copytree if checkpoints[form].is_dir() else shutil.copy)(checkpoints[form], path)
    damage(path)
    with pytest.raises(CheckpointError, match=reason) as refused:
        open_checkpoint(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
