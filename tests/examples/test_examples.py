"""The programs under examples/ run, at a small size."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
from small import SMALL_DATA
from tree import ROOT

Train = Callable[[Sequence[str]], dict[str, str]]
SMALL = [*(o for o in SMALL_DATA if "people" not in o and "cities" not in o), "model.memory.n_keys=16"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Returns `train` of examples/train_from_python.py, with the folder on the import path."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    trained: Train = importlib.import_module("train_from_python").train
    return trained


def test_training_from_python_with_the_own_ffn_answers_the_prompts(train: Train) -> None:
    own = ["ffn=custom", "ffn._target_=own_ffn.TokenTable", "+ffn.rows=600"]
    answers = train([*SMALL, *own, "trainer.max_steps=2"])
    assert list(answers) == ["The capital of France is", "Latvia calls its capital"]
