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
import torch

from pkm_lightning.data import FactsDataModule, HeldOutDataModule
from pkm_lightning.data.base import FactSpace, RecallItem
from pkm_lightning.data.held_out import copy_files, keep_held_out
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
    assert data.validation_items() == [QUESTION]
    assert data.fingerprint == "ab"


def test_the_sets_that_facts_were_drawn_from_are_kept_whole(tmp_path: Path) -> None:
    data, space = written(tmp_path), {"people": 4, "names": 512, "attributes": 3, "values": 64}
    assert data.fact_space is None
    source = tmp_path / "source.json"
    for change, fits in (({}, True), ({"people": 0}, False), ({"values": "64"}, False), ({"more": 1}, False)):
        source.write_text(json.dumps({"fingerprint": "ab", "fact_space": {**space, **change}}))
        if fits:
            assert data.fact_space == FactSpace(**space)
            continue
        with pytest.raises(DataError, match=r"source\.json is damaged"):
            _ = data.fact_space


def test_a_test_of_its_own_and_questions_of_validations_are_kept(
    facts: Callable[..., FactsDataModule], tmp_path: Path
) -> None:
    data = facts()
    data.prepare_data()
    keep_held_out(data, tmp_path / "first")
    copy_files(tmp_path / "first", tmp_path / "kept")
    data.tokenizer.save(tmp_path / "tokenizer.json")
    kept = HeldOutDataModule(
        folder=str(tmp_path / "kept"), tokenizer=str(tmp_path / "tokenizer.json"), seq_len=64, vocab_size=600,
        global_batch_size=8, num_workers=0, order_seed=0, cache_dir=str(tmp_path), prompts=[], prompts_file=None,
    )  # fmt: skip
    kept.prepare_data()
    assert (kept.recall_items(), kept.validation_items()) == (data.recall_items(), data.validation_items())
    assert kept.own_test
    loaders = ((kept.val_dataloader(), data.val_dataloader()), (kept.test_dataloader(), data.test_dataloader()))
    for ours, theirs in loaders:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
    (tmp_path / "kept" / "validation_questions.json").unlink()
    with pytest.raises(DataError, match=r"validation_questions\.json is damaged or missing"):
        kept.load(tmp_path / "kept")


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
