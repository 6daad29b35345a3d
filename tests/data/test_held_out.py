"""What a run has kept of its data: read back as written, and refused where a file of it is damaged or made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pkm_lightning.data import HeldOutDataModule
from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.held_out import keep_held_out
from pkm_lightning.data.kept_questions import read_questions, write_questions
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import DataError

QUESTION = RecallItem("Who", "I", ("I", "he"), "relation", "seen", 2, 1, 0.5, True)
ARRAYS = {
    "inputs": np.arange(5, dtype=np.uint16),
    "labels": np.array([3, -100, 4, 5, -100], dtype=np.int32),
    "documents": np.zeros(5, dtype=np.int32),
    "widths": np.array([3, 2]),
}


def written(folder: Path, **arrays: Any) -> HeldOutDataModule:
    """Returns the data module of a folder with ARRAYS, some of them others."""
    np.savez_compressed(folder / "sequences.npz", **{**ARRAYS, **arrays})
    write_questions(folder / "questions.json", [QUESTION])
    (folder / "source.json").write_text(json.dumps({"data": "TextDataModule", "fingerprint": "ab"}))
    bytes_tokenizer().save(folder / "tokenizer.json")
    return HeldOutDataModule(
        folder=str(folder), tokenizer=str(folder / "tokenizer.json"), seq_len=3, vocab_size=258, global_batch_size=2,
        num_workers=0, order_seed=0, cache_dir=str(folder), prompts=[], prompts_file=None,
    )  # fmt: skip


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    data = written(tmp_path)
    data.prepare_data()
    batch = data.splits.validation.__getitems__([0, 1])
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, bytes_tokenizer().pad_id]]
    assert data.recall_items() == [QUESTION]
    assert data.recall_items(limit=0) == []
    assert data.fingerprint == "ab"


@pytest.mark.parametrize(
    "arrays",
    [
        {"inputs": np.array([0, 1, 2, 3, 258])},
        {"inputs": np.array([0, 1, 2, 3, -1])},
        {"inputs": np.full(5, 2**64 - 1, dtype=np.uint64)},
        {"inputs": np.zeros(5)},
        {"inputs": np.zeros((1, 5), dtype=int)},
        {"labels": np.array([0, 1, 2, 3, 258])},
        {"labels": np.zeros(4, dtype=int)},
        {"widths": np.array([5, 0])},
        {"widths": np.array([], dtype=int)},
        {"widths": np.array([2**62, 2**62, 2**62, 2**62 + 5])},  # their sum wraps around to 5
    ],
    ids=str,
)
def test_sequences_that_cannot_be_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"sequences\.npz is damaged"):
        written(tmp_path, **arrays).prepare_data()


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: 3,
        lambda entry: [3],
        lambda entry: [{**entry, "more": 1}],
        lambda entry: [{**entry, "prompt": None}],
        lambda entry: [{**entry, "answer": 7}],
        lambda entry: [{**entry, "options": 5}],
        lambda entry: [{**entry, "options": [5]}],
        lambda entry: [{**entry, "form": ["seen"]}],
        lambda entry: [{**entry, "decile": None}],
        lambda entry: [{**entry, "prior_bits": "many"}],
    ],
)
def test_questions_of_other_kinds_are_refused_before_work(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    data = written(tmp_path)
    (entry,) = json.loads((tmp_path / "questions.json").read_text())
    (tmp_path / "questions.json").write_text(json.dumps(change(entry)))
    with pytest.raises(DataError, match=r"questions\.json is damaged"):
        data.prepare_data()


@pytest.mark.parametrize("content", ["{}", "[]", '{"fingerprint": {}}', "3", "{"])
def test_a_source_without_a_fingerprint_is_refused(tmp_path: Path, content: str) -> None:
    data = written(tmp_path)
    (tmp_path / "source.json").write_text(content)
    with pytest.raises(DataError, match=r"source\.json is damaged"):
        _ = data.fingerprint


def test_scalars_of_numpy_are_kept_as_numbers(tmp_path: Path) -> None:
    item = RecallItem("Who", "I", (), "r", "seen", np.int64(2), np.int64(1), np.float32(0.5), np.bool_(True))  # type: ignore[arg-type]
    unknown = RecallItem("Who", "I", (), "r", "seen", 2, 1, math.nan, False)
    write_questions(tmp_path / "questions.json", [item, unknown])
    first, second = read_questions(tmp_path / "questions.json")
    assert (first.exposures, first.prior_bits, first.majority) == (2, 0.5, True)
    assert math.isnan(second.prior_bits)


def test_nothing_is_kept_of_an_empty_validation(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(
        splits=SimpleNamespace(validation_keys=[], validation=None, test=None, tokenizer=bytes_tokenizer())
    )
    keep_held_out(data, tmp_path / "heldout")
    assert not (tmp_path / "heldout").exists()
