"""Batches of statements against a naive construction, one sequence at a time."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.data.statements import StatementSequences, StatementStore, write_statements
from pkm_lightning.errors import ConfigError

STATEMENTS = [[5, 6, 7, 1], [8, 9, 1], [10, 11, 12, 13, 14, 1], [15, 1]]
ANSWER_STARTS = [2, 1, 4, 0]


@pytest.fixture
def store(tmp_path: Path) -> StatementStore:
    write_statements(tmp_path, STATEMENTS, ANSWER_STARTS, vocab_size=300)
    return StatementStore(tmp_path)


def naive_sequence(key: list[int], answer_only: bool) -> tuple[list[int], list[int], list[int]]:
    inputs, labels, docs = [], [], []
    for doc, statement in enumerate(key):
        tokens = STATEMENTS[statement]
        for t in range(len(tokens) - 1):
            inputs.append(tokens[t])
            labels.append(tokens[t + 1] if not answer_only or t + 1 >= ANSWER_STARTS[statement] else NO_TARGET)
            docs.append(doc)
    return inputs, labels, docs


@pytest.mark.parametrize("answer_only", [True, False])
@pytest.mark.parametrize("width", [None, 12])
def test_batches_equal_the_naive_sequences(store: StatementStore, width: int | None, answer_only: bool) -> None:
    keys = [[0, 1], [2], [3, 0, 2]]
    source = StatementSequences(store, width=width, answer_only=answer_only, pad_id=0)
    batch = source.__getitems__([np.asarray(key) for key in keys])
    assert batch["input_ids"].shape == (3, width or 16)
    for b, key in enumerate(keys):
        inputs, labels, docs = naive_sequence(key, answer_only)
        n = len(inputs)
        assert batch["input_ids"][b].tolist() == inputs + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][b, :n].tolist() == labels
        assert batch["doc_ids"][b, :n].tolist() == docs
        assert (batch["labels"][b, n:] == NO_TARGET).all()
        assert (batch["doc_ids"][b, n:] == -1).all()
    assert torch.equal(batch["valid"], batch["doc_ids"] >= 0)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "doc_ids": torch.int64,
        "valid": torch.bool,
    }


def test_no_keys_make_a_batch_without_targets(store: StatementStore) -> None:
    batch = StatementSequences(store, width=12, answer_only=True, pad_id=0).__getitems__([])
    assert batch["labels"].shape == (1, 12)
    assert (batch["labels"] == NO_TARGET).all()
    assert not batch["valid"].any()


def test_a_source_survives_pickling(store: StatementStore) -> None:
    source = StatementSequences(store, width=12, answer_only=True, pad_id=0)
    copy = pickle.loads(pickle.dumps(source))
    key = [np.asarray([0, 2])]
    assert torch.equal(source.__getitems__(key)["labels"], copy.__getitems__(key)["labels"])


def test_a_statement_longer_than_a_sequence_is_refused(store: StatementStore) -> None:
    store.require_fit(5)
    with pytest.raises(ConfigError, match=r"data\.seq_len=4 .* set data\.seq_len=5 or more"):
        store.require_fit(4)
