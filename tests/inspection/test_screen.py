"""A record on the screen: figures in their places, texts that cannot act on the terminal, and what is left out."""

from __future__ import annotations

import io
import re

import pytest
from inspection.example_record import example_record
from rich.console import Console

from pkm_lightning.inspection.record import AblationRecord, Record
from pkm_lightning.inspection.screen import end_of, masked_slots, show, start_of, visible


def shown(record: Record, rows: int = 20, width: int = 160) -> str:
    console = Console(file=io.StringIO(), markup=False, emoji=False, width=width)
    show(record, console, rows)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_screen_shows_tokens_with_their_main_reads_slots_and_masks() -> None:
    record = example_record()
    text, reads = record.texts[0], record.texts[0].reads["layer1.slot"]
    assert reads.effects is not None
    best = max(range(8), key=lambda c: abs(reads.effects[0][c]))  # type: ignore[index]
    page = shown(record)
    assert f"layer1.slot: {reads.slots[0][best]} ({reads.weights[0][best]:.2f}) {reads.effects[0][best]:+.2f}" in page
    assert "effects: exact; readers of slots out of validation" in page
    assert f"{text.p[0]:.3f}" in page
    assert "Alice Smith was born in -> " in page
    assert "without all slots of table1" in page
    assert "text 2: loss 2.500 -> 3.250 nats per token" in page
    assert "questions answered: 0.750 -> 0.500" in page


@pytest.mark.parametrize(
    ("masked", "words"),
    [({"a": [3]}, "slot 3 of a"), ({"a": [3, 4], "b": None}, "slots 3, 4 of a and all slots of b")],
)
def test_masked_slots_are_in_singular_and_plural(masked: dict[str, list[int] | None], words: str) -> None:
    assert masked_slots(AblationRecord(masked, [], [], [], [])) == words


def test_what_does_not_fit_is_counted() -> None:
    record = example_record(tokens=30)
    page = shown(record, rows=4)
    assert "26 more tokens: set show=30, or format=json or html" in page
    count = len(record.slots["table1"])
    assert f"{count - 4} more slots: set show={count}" in page
    assert "1 more token: set show=30," in shown(record, rows=29)
    assert max(map(len, page.splitlines())) <= 160


def test_without_effects_the_largest_weights_come_first() -> None:
    record = example_record()
    record.effects = "none"
    for text in record.texts:
        for of_reader in text.reads.values():
            of_reader.effects = None
    reads = record.texts[0].reads["layer4.before.slot"]
    best = max(range(3), key=lambda c: abs(reads.weights[0][c]))
    page = shown(record)
    assert re.search(rf"layer4.before.slot: {reads.slots[0][best]} \({reads.weights[0][best]:.2f}\),", page)
    assert "those of the largest weights first" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a", " a"),
        ("\n", "\\n"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
        ("[bold]", "[bold]"),
        (":smile:", ":smile:"),
    ],
)
def test_characters_that_a_terminal_acts_on_are_escaped(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_what_is_cut_has_an_ellipsis() -> None:
    assert (start_of("abc", 3), end_of("abc", 3)) == ("abc", "abc")
    assert (start_of("abcd", 3), end_of("abcd", 3)) == ("abc...", "...bcd")
    record = example_record()
    facts = next(one.facts for one in record.slots["table1"].values() if one.facts)
    facts[0] = facts[0]._replace(prompt="long " * 20)
    assert f" ...{'long ' * 8} -> {facts[0].answer}" in shown(record, rows=1000, width=400)
