"""`table.trainable`, `path` and `tensor`: what is found in a file, and what is refused in one sentence.

Letters: N rows, V values per row.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import resolved
from stored_files import write_tensors

from pkm_lightning.build.model import build_model
from pkm_lightning.build.stored_tables import RowsOnFile, check_first_rows
from pkm_lightning.errors import PkmError
from pkm_lightning.ffn import TableSpec

#: 256 rows of 16 values.
MODEL = ["ffn=memory_plus", "model=tiny", "model.dim=16", "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2",
         "model.memory.n_keys=16", "data.vocab_size=600"]  # fmt: skip
N, V = 256, 16


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the working directory: one table, two, none of the shape, a folder with an index, and damaged ones."""
    monkeypatch.chdir(tmp_path)
    rows_NV = torch.randn(N, V)
    write_tensors(Path("one.safetensors"), {"rows": rows_NV.bfloat16(), "other": torch.zeros(3)})
    write_tensors(Path("two.safetensors"), {"tables.0.weight": rows_NV, "tables.1.weight": -rows_NV})
    write_tensors(Path("codes.safetensors"), {"rows": torch.zeros(N, V, dtype=torch.int16)})
    write_tensors(Path("larger.safetensors"), {"rows": torch.zeros(N + 1, V)})
    Path("folder").mkdir()
    write_tensors(Path("folder/model-1.safetensors"), {"rows": rows_NV})
    write_tensors(Path("folder/unlisted.safetensors"), {"rows_too": rows_NV})
    index = {"weight_map": {"rows": "model-1.safetensors"}}
    Path("folder/model.safetensors.index.json").write_text(json.dumps(index))
    Path("empty").mkdir()
    Path("cut.safetensors").write_bytes(Path("one.safetensors").read_bytes()[:-1])
    Path("text.safetensors").write_text("no header")


@pytest.mark.parametrize("path", ["folder", "$HERE/one.safetensors"])
def test_a_frozen_table_has_the_rows_of_the_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", str(tmp_path))
    run = resolved(*MODEL, "table.trainable=false", f"table.path={path}", training=True)
    assert run.config["table"]["path"] == str(tmp_path / path.replace("$HERE/", ""))
    assert not any("tables" in name and "digest" not in name for name in run.weight_shapes)
    (table,) = build_model(run.config).tables
    assert table.stored is not None
    expected_NV = table.stored.read(torch.arange(N)).float()
    assert torch.equal(table.weight, expected_NV)
    assert expected_NV.abs().sum() > 0


def test_each_of_several_tables_has_its_own_tensor() -> None:
    two = ["table=own", "placement.layers=[0,1]", "table.path=two.safetensors", "table.tensor='tables.{}.weight'"]
    first, second = build_model(resolved(*MODEL, *two, "table.trainable=false").config).tables
    assert torch.equal(first.weight, -second.weight)


def test_drawn_rows_are_those_of_a_table_that_learns() -> None:
    frozen = build_model(resolved(*MODEL, "table.trainable=false").config)
    learning = build_model(resolved(*MODEL).config)
    for model in (frozen, learning):
        model.init_weights(3)
    assert torch.equal(frozen.tables[0].weight, learning.tables[0].weight)
    assert (frozen.tables[0].learns, learning.tables[0].learns) == (False, True)
    assert "tables.0.weight" in frozen.state_dict()


FOUND = "its largest are"


@pytest.mark.parametrize(
    ("path", "tensor", "count", "reason"),
    [
        ("gone.safetensors", None, 1, "gone.safetensors cannot be read (No such file or directory)"),
        ("empty", None, 1, "empty holds no .safetensors file"),
        ("cut.safetensors", None, 1, "cut.safetensors is no whole safetensors file"),
        ("text.safetensors", None, 1, "text.safetensors is no whole safetensors file"),
        ("larger.safetensors", None, 1, "holds no tensor of 256 x 16 values, as the model's table has, whose size"),
        ("larger.safetensors", "rows", 1, "rows has 257 x 16 values of float32, but the model's table has 256 x 16"),
        ("one.safetensors", "row", 1, f"holds no tensor row (table.tensor); {FOUND} rows"),
        ("codes.safetensors", None, 1, "rows has 256 x 16 values of int16"),
        ("two.safetensors", None, 1, "choose one with table.tensor=tables.0.weight or tables.1.weight"),
        ("one.safetensors", None, 2, "table.tensor=null names one tensor, but this model has 2 tables"),
        ("one.safetensors", "rows", 2, "table.tensor=rows names one tensor, but this model has 2 tables"),
    ],
)
def test_refuses_what_is_no_such_table(path: str, tensor: str | None, count: int, reason: str) -> None:
    table = {"path": path, "tensor": tensor, "trainable": False}
    with pytest.raises(PkmError) as error:
        RowsOnFile(table, TableSpec(rows=N, dim=V), 0, count).keywords()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("table.path=gone.safetensors", "gone.safetensors cannot be read"),
        ("table.path=''", "table.path='' names no file"),
        ("table.path=3", "table.path=3 is not text or null"),
        ("table.tensor=rows", "table.tensor=rows names a tensor of table.path, which is null"),
        ("table.trainable=no", "table.trainable"),
        ("table.path=one.safetensors table._target_=pkm_lightning.memory.QuantizedTable +table.bits=8 "
         "~table.learning", "is read by pkm_lightning.memory.ValueTable only"),
    ],
)  # fmt: skip
def test_refuses_settings_before_anything_is_built(overrides: str, reason: str) -> None:
    given = [] if "trainable" in overrides else ["table.trainable=false"]
    with pytest.raises(PkmError) as error:
        resolved(*MODEL, *given, *overrides.split(), training=True)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ("", "table.trainable=false and table.path=FILE"),
        ("table.trainable=false", "set table.path=FILE to train"),
        ("table.path=one.safetensors", "set table.trainable=false to train"),
    ],
)
def test_a_table_that_stays_in_a_file_must_be_frozen_and_have_one(overrides: str, missing: str) -> None:
    with pytest.raises(PkmError, match=r"table\.device=mmap: a table that stays in a file cannot learn") as error:
        resolved(*MODEL, "table.device=mmap", *overrides.split(), training=True)
    assert missing in str(error.value)
    resolved(*MODEL, "table.device=mmap", *overrides.split())  # an evaluation reads the checkpoint, or the file


def test_first_rows_are_needed_by_a_new_run_only() -> None:
    run = resolved(*MODEL, "table.path=gone.safetensors", training=True)
    with pytest.raises(PkmError, match=r"gone\.safetensors cannot be read"):
        check_first_rows(run.model)


def test_a_plan_counts_no_memory_for_rows_that_stay_in_a_file() -> None:
    def held(*overrides: str) -> tuple[int, int]:
        memory = resolved(*MODEL, *overrides, training=True).plan.memory
        return memory.table_part, memory.table_states

    frozen = ["table.trainable=false", "table.path=one.safetensors"]
    assert held(*frozen) == (N * V * 4, 0)
    assert held(*frozen, "table.device=mmap") == (0, 0)
    assert held()[1] > 0
