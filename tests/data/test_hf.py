"""`data=hf` as a data module: parts by split and by file, keys that are refused, and what changes the prepared data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pkm_lightning.data import HfDataModule
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.errors import ConfigError, DataError


def write(file: Path, words: str, rows: int = 30) -> None:
    pq.write_table(pa.table({"body": [f"{words} {i}" for i in range(rows)]}), file)


def texts(loader: Any, datamodule: HfDataModule) -> set[str]:
    return {
        datamodule.tokenizer.decode(ids[: int((ids != datamodule.tokenizer.pad_id).sum())].tolist())
        for batch in loader
        for ids in batch["input_ids"]
    }


def test_splits_of_a_folder_are_the_parts(hf: Callable[..., HfDataModule], tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}-00000-of-00001.parquet", f"{split} text")
    write(tmp_path / "dev-00000-of-00001.parquet", "validation text", rows=0)
    (tmp_path / "README.md").write_text("#")
    datamodule = hf(
        str(tmp_path), text_field="body", packing="none", val_split="validation", test_split="test", limit=20
    )
    datamodule.prepare_data()
    for loader, split in ((datamodule.val_dataloader(), "validation"), (datamodule.test_dataloader(), "test")):
        assert texts(loader, datamodule) == {f"{split} text {i}" for i in range(20)}
    assert read_index(datamodule.cache_folder())["skipped"] == {"empty files": 1, "files of other endings: .md": 1}
    n_train = len(datamodule.splits.order.keys(0)[:])
    assert n_train == 20
    assert datamodule.cache_key() != hf(str(tmp_path), text_field="body", limit=20).cache_key()
    fewer = hf(str(tmp_path), text_field="body", val_split="validation", test_split="test", limit=19)
    assert fewer.cache_key() != datamodule.cache_key()


def test_a_share_of_the_rows_validates_where_there_is_no_split(hf: Callable[..., HfDataModule], tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", "text", rows=200)
    datamodule = hf(str(tmp_path), text_field="body", packing="none", test_fraction=0.1)
    datamodule.prepare_data()
    held_out = texts(datamodule.val_dataloader(), datamodule), texts(datamodule.test_dataloader(), datamodule)
    assert all(5 < len(part) < 80 for part in held_out)
    assert not held_out[0] & held_out[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"rows\.parquet has no column 'text' \(columns present: body\); set data\.text_field"),
        ({"limit": 0}, r"data\.limit=0 is out of range; allowed: 1 or more"),
        ({"split": " "}, r"data\.split=' ' names no split; set one, such as train"),
        ({"val_path": "none.parquet"}, r"data\.val_path=none\.parquet does not exist"),
        ({"path": ""}, r"data\.path= names no files"),
        ({"name": "en"}, r"data\.name=en is of a dataset on the hub, and data\.path=.* are files; leave it out"),
    ],
)
def test_bad_keys_and_columns_are_refused(
    hf: Callable[..., HfDataModule], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "rows.parquet", "text")
    with pytest.raises((ConfigError, DataError), match=message):
        hf(changes.pop("path", str(tmp_path)), **changes).prepare_data()


def test_a_split_that_validates_is_refused_by_its_own_key(hf: Callable[..., HfDataModule], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a text"}\n' * 20)
    with pytest.raises(ConfigError, match=r"^data\.val_split=validation: the files of .* are of the splits train; set"):
        hf(str(tmp_path), val_split="validation").prepare_data()
