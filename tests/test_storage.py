"""What is written can be read back as it was."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from pkm_lightning.callbacks.recall import write_scores
from pkm_lightning.compare.run_files import read_answers
from pkm_lightning.inference.recall import ItemScore
from pkm_lightning.storage import csv_line

TEXTS = ["plain", "", "a,b", 'say "x"', "one\rtwo", "one\ntwo", "one\r\ntwo", "\r", " \t", "ümlaut \u2028"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_of_csv_is_one_row_whatever_it_holds(text: str) -> None:
    line = csv_line(["before", text, 2.5])
    assert line.endswith("\n")
    assert not line.endswith("\r\n")
    assert list(csv.reader(io.StringIO(line + line, newline=""))) == [["before", text, "2.5"]] * 2


@pytest.mark.parametrize("answer", TEXTS)
def test_answers_of_an_untrained_model_are_read_back(tmp_path: Path, answer: str) -> None:
    score = ItemScore(
        form="seen", relation="all", decile=1, prompt="Who?", truth="He", answer=answer, exact=True, chosen=None,
        bits=1.0, prior_bits=3.0,
    )  # fmt: skip
    write_scores(tmp_path / "recall.csv", [score, score])
    answers = read_answers(tmp_path / "recall.csv")["seen"]
    assert answers.exact.tolist() == [True, True]
    assert answers.bits.tolist() == [2.0, 2.0]
