"""The record of an inspection survives its file, and a file of another kind is refused."""

from __future__ import annotations

import json

import pytest
from inspection.example_record import example_record

from pkm_lightning.errors import DataError
from pkm_lightning.inspection.record import Record


def test_a_record_comes_back_from_json_as_it_was() -> None:
    record = example_record()
    text = record.to_json()
    assert Record.from_json(text) == record
    assert "\n" not in text


def test_numbers_that_json_lacks_are_null() -> None:
    record = example_record()
    record.texts[0].p[0], record.texts[0].p[1] = float("nan"), float("-inf")
    assert json.loads(record.to_json())["texts"][0]["p"][:2] == [None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.json is no record of an inspection"),
        ("[]", "x.json is no record of an inspection"),
        ('{"version": 1}', "KeyError: 'model'"),
        ('{"version": 7}', "x.json is a record of version 7, not 1; inspect again."),
    ],
)
def test_another_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Record.from_json(text, "x.json")
