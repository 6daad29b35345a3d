"""Files of edits: what is written comes back, damage is refused, and the digest is that of the weights alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toys import memory_ffns, transformer

from pkm_lightning.checkpoints import open_checkpoint
from pkm_lightning.checkpoints.edit_file import Edit, LineDeltas, state_digest, weights_digest
from pkm_lightning.checkpoints.export import write
from pkm_lightning.errors import CheckpointError


def an_edit(**changes: Any) -> Edit:
    deltas = LineDeltas(torch.tensor([1, 5, 6]), torch.randn(3, 10))
    values: dict[str, Any] = {
        "name": "town",
        "weights": "f" * 64,
        "tables": {"tables.0.weight": deltas},
        "facts": ({"prompt": "The mayor of Zü is", "answer": "Ö"},),
        "created": "2030-01-31T12:00:00+00:00",
        "note": "mayors",
        "settings": {"lr": 0.1},
        "figures": {"kl": 0.001},
    }
    return Edit(**{**values, **changes})


def test_an_edit_comes_back_under_the_name_of_its_file(tmp_path: Path) -> None:
    edit = an_edit()
    edit.save(tmp_path / "renamed.safetensors")
    loaded = Edit.load(tmp_path / "renamed.safetensors")
    (before,), (after,) = edit.tables.values(), loaded.tables.values()
    assert torch.equal(before.lines_U, after.lines_U)
    assert torch.equal(before.values_UV, after.values_UV)
    fields = ("weights", "facts", "created", "note", "settings", "figures", "n_lines")
    assert [getattr(edit, name) for name in fields] == [getattr(loaded, name) for name in fields]
    assert loaded.name == "renamed"
    assert [entry.name for entry in tmp_path.iterdir()] == ["renamed.safetensors"]
    with safe_open(tmp_path / "renamed.safetensors", "pt") as file:  # any reader of the format opens it
        assert set(file.keys()) == {"tables.0.weight.lines", "tables.0.weight.deltas"}


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        (LineDeltas(torch.tensor([5, 1, 6]), torch.randn(3, 10)), "not ascending"),
        (LineDeltas(torch.tensor([1, 1, 6]), torch.randn(3, 10)), "not ascending"),
        (LineDeltas(torch.tensor([-1, 1, 6]), torch.randn(3, 10)), "no row numbers"),
        (LineDeltas(torch.tensor([1, 5]), torch.randn(3, 10)), "do not fit the lines"),
        (LineDeltas(torch.tensor([1, 5, 6]), torch.full((3, 10), torch.nan)), "no finite number"),
        (LineDeltas(torch.tensor([1, 5, 6]), torch.ones(3, 10, dtype=torch.int64)), "do not fit the lines"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deltas_that_mean_nothing_are_refused(tmp_path: Path, deltas: LineDeltas, reason: str) -> None:
    an_edit(tables={"t.weight": deltas}).save(tmp_path / "e.safetensors")
    with pytest.raises(CheckpointError, match=rf"e.safetensors is damaged \(.*{reason}"):
        Edit.load(tmp_path / "e.safetensors")


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    an_edit().save(path)
    content = path.read_bytes()
    for place in (20, len(content) - 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            Edit.load(path)
    for shortened in (content[:-1], content[:10], b""):
        path.write_bytes(shortened)
        with pytest.raises(CheckpointError, match=r"is damaged|cannot be read"):
            Edit.load(path)
    with pytest.raises(CheckpointError, match="is no file of an edit"):
        Edit.load(tmp_path / "none.safetensors")


def test_the_digest_is_one_for_all_forms_of_the_weights(tmp_path: Path) -> None:
    model = transformer(*memory_ffns())
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {
        "state_dict": state,
        "hyper_parameters": {"config": {key: {} for key in ("model", "ffn", "data", "trainer")}},
        "tokens_seen": 1,
    }
    torch.save(content, tmp_path / "one.ckpt")
    write(open_checkpoint(tmp_path / "one.ckpt"), tmp_path / "two.safetensors")
    digests = {weights_digest(open_checkpoint(tmp_path / name)) for name in ("one.ckpt", "two.safetensors")}
    assert digests == {state_digest(model.state_dict())}
    other = copy.deepcopy(model)
    other.tables[0].weight.data[3, 2] += 1e-6
    assert state_digest(other.state_dict()) not in digests
