"""The page in a real browser, driven by mouse and keyboard: what it shows equals the record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from inspection.example_record import example_record

from pkm_lightning.inspection.page import render
from pkm_lightning.inspection.record import Record

RECORD = example_record(tokens=40)
TOKEN = 5


@pytest.fixture
def page(tab: Page, tmp_path: Path) -> Iterator[Page]:
    """Yields the page of `RECORD`, just opened; at the end it has neither made an error nor asked for anything."""
    file = tmp_path / "page.html"
    file.write_text(render(RECORD), encoding="utf-8")
    tab.open(file.as_uri())
    yield tab
    assert (tab.errors, tab.requests) == ([], [])


def float32(values: Any) -> list[float]:
    return np.asarray(values, dtype=np.float32).tolist()


def attributes(page: Page, selector: str, *names: str) -> list[tuple[float, ...]]:
    """Returns numbers that elements carry, for each element that the selector names."""
    texts = page.evaluate(
        f"[...document.querySelectorAll({selector!r})].map((e) => {list(names)!r}.map((name) => e.dataset[name]))"
    )
    return [tuple(map(float, row)) for row in texts]


def rows(page: Page, reader: str) -> list[tuple[float, ...]]:
    """Returns slot, weight and effect of each row that the page shows of a reader, in their order."""
    section = f'section[data-reader="{reader}"] '
    columns = [
        attributes(page, f"{section}[data-{name}]", name) for name in ("slot", "weight", "effect")
    ]  # fmt: skip
    return [(*slot, *weight, *effect) for slot, weight, effect in zip(*columns, strict=True)]


def readers(record: Record, table: str, slot: int) -> list[tuple[float, ...]]:
    """Returns text, position, weight and effect of every read of a slot, the largest weight first."""
    reads = []
    for number, text in enumerate(record.texts):
        for reader in record.readers:
            one = text.reads[reader.name]
            for t, slots in enumerate(one.slots):
                for c, other in enumerate(slots):
                    if reader.table == table and other == slot:
                        assert one.effects
                        reads.append((number, t, *float32([one.weights[t][c], one.effects[t][c]])))
    return sorted(reads, key=lambda read: -abs(read[2]))


def test_a_click_on_a_token_shows_its_prediction_and_its_reads(page: Page) -> None:
    page.click(f'#tokens [data-token="{TOKEN}"]')
    text = RECORD.texts[0]
    assert page.evaluate("location.hash") == f"#token={TOKEN}"
    assert attributes(page, "#panel strong", "p") == [(p,) for p in float32([text.p[TOKEN], text.p_without[TOKEN]])]
    shown = [p for (p,) in attributes(page, "#panel .expected li", "p")]
    tops = [text.top, text.top_without, *(ablation.top_without[0] for ablation in RECORD.ablations)]
    assert shown == float32([row[2] for top in tops for row in top[TOKEN]])
    for reader in RECORD.readers:
        one = text.reads[reader.name]
        assert one.effects
        expected = list(zip(one.slots[TOKEN], float32(one.weights[TOKEN]), float32(one.effects[TOKEN]), strict=True))
        assert rows(page, reader.name) == sorted(expected, key=lambda row: -abs(row[2]))
        page.click(f'section[data-reader="{reader.name}"] th button')
        assert rows(page, reader.name) == sorted(expected, key=lambda row: -abs(row[1]))


def test_a_click_on_a_slot_shows_its_readers_which_lead_to_their_tokens(page: Page) -> None:
    page.click(f'#tokens [data-token="{TOKEN}"]')
    slot = RECORD.texts[0].reads["layer3.slot"].slots[TOKEN][2]
    page.click(f'section[data-reader="layer3.slot"] [data-slot="{slot}"]')
    expected = readers(RECORD, "table0", slot)
    assert attributes(page, ".here button", "text", "token", "weight", "effect") == expected
    marked = attributes(page, "#tokens .reader", "text", "token")
    assert marked == sorted({(text, token) for text, token, *_ in expected})
    known = RECORD.slots["table0"][str(slot)]
    others = [one for one in known.readers if isinstance(one.text, str)]
    assert attributes(page, ".readers.data div", "weight") == [(one.weight,) for one in others]
    assert [text.split(", weight")[0] for text in page.texts(".readers.data li")] == [
        f"{one.before}{one.token}{one.after}{one.text}, token {one.position}" for one in others
    ]
    assert "Alice Smith was born in" in page.texts("#panel .readers")[0]
    assert f"read {known.reads} time" in page.texts("#panel p")[0]
    number = next(i for i, read in enumerate(expected) if read[0] == 1)
    page.click(f".here li:nth-child({number + 1}) button")
    assert page.evaluate("location.hash") == f"#text=1&token={expected[number][1]}"
    assert page.texts("#panel h2")[0].startswith(f"Token {expected[number][1]} of 40")
    for heading in (f"Slot {slot} of table0", f"Token {TOKEN} of 40", "Click a token"):
        page.evaluate("history.back()")
        page.wait(f"document.querySelector('#panel h2').textContent.startsWith({heading!r})")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "heading", "n_marked"),
    [
        ("#token=7", "Token 7 of 40", 1),
        ("#text=1&token=3&slot=0&table=table1", "Slot 0 of table1", 1),
        ("#slot=3&table=layer2.expert&colour=help", "Expert 3 of layer2.expert", 0),
        ("#token=40&slot=99999&table=none&text=2&colour=none", "Click a token", 0),
        ("#token=-1&slot=1e3&text=%E0%A4", "Click a token", 0),
    ],
)
def test_an_address_leads_to_what_it_names(page: Page, address: str, heading: str, n_marked: int) -> None:
    page.evaluate(f"location.hash = {address!r}")
    page.wait(f"document.querySelector('#panel h2').textContent.startsWith({heading!r})")
    assert len(page.texts("#tokens .selected")) == n_marked


@pytest.mark.slow
def test_the_keyboard_goes_from_tokens_to_slots_and_back(page: Page) -> None:
    page.click('#tokens [data-token="0"]')
    for key, position in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 39), ("Home", 0)]:
        page.press(key)
        assert page.evaluate("document.activeElement.dataset.token") == str(position)
        assert page.evaluate("location.hash") == f"#token={position}"
    page.press("ArrowDown")
    below = page.evaluate("document.activeElement.dataset.token")
    page.press("ArrowUp")
    assert int(below) > 0
    assert page.evaluate("document.activeElement.dataset.token") == "0"
    page.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.evaluate("document.querySelector('[data-slot]').focus()")
    page.press("Enter")
    assert page.texts("#panel h2")[0].startswith("Slot ")
    for address in ("#token=0", ""):
        page.press("Escape")
        assert page.evaluate("location.hash") == address


@pytest.mark.slow
def test_the_search_leads_to_slots_tokens_and_facts(page: Page) -> None:
    text = RECORD.texts[0]
    word = next(token for _, token in text.tokens if token.strip().isalpha() and token.isascii())
    for query, presses, heading in [
        ("slot 17", ["Enter"], "Slot 17 of table0"),
        ("17", ["ArrowDown", "ArrowDown", "Enter"], "Slot 17 of table1"),
        ("token 9", ["Enter"], "Token 9 of 40"),
        (word.upper(), ["Enter"], f"Token {[token for _, token in text.tokens].index(word)} of 40"),
        ("Smith was born in", ["ArrowUp", "Enter"], "Slot "),
    ]:
        page.evaluate("document.activeElement.blur()")
        page.press("/")
        page.evaluate("document.getElementById('search').select()")
        page.write(query)
        for key in presses:
            page.press(key)
        assert page.texts("#panel h2")[0].startswith(heading), query
    page.press("/")
    page.write("nothing has this")
    assert page.texts("#hits li") == ["Nothing here has this text or number."]
    page.press("Escape")
    assert page.evaluate("document.getElementById('hits').hidden")


@pytest.mark.slow
def test_colours_follow_the_figures(page: Page) -> None:
    p, without = (
        np.concatenate([np.float64(float32(getattr(text, name))) for text in RECORD.texts])
        for name in ("p", "p_without")
    )
    of_reader = {
        reader.name: np.concatenate(
            [np.float64(float32(text.reads[reader.name].effects)).sum(1) for text in RECORD.texts]
        )
        for reader in RECORD.readers
    }
    figures = {"surprise": -np.log(p), "help": np.log(p) - np.log(without), "effect": sum(of_reader.values())}
    figures["effect:layer3.slot"] = of_reader["layer3.slot"]
    followed = np.array([target is not None for text in RECORD.texts for target in text.targets])
    for name, values in figures.items():
        page.evaluate(f"location.hash = 'colour={name}'")
        page.wait(f"document.getElementById('colour').value === {name!r}")
        shown = page.evaluate("[...document.querySelectorAll('#tokens [data-token]')].map((e) => e.className)")
        classes = [names.split() for names, follows in zip(shown, followed, strict=True) if follows]
        levels = np.array([int(names[1].removeprefix("level")) for names in classes])
        values = values[followed]
        assert np.all(np.diff(levels[np.argsort(np.abs(values))]) >= 0)
        assert set(levels) >= {1, 8}
        signs = ["amount" if name == "surprise" else "minus" if value < 0 else "plus" for value in values]
        assert [names[2] for names in classes] == signs


@pytest.mark.slow
def test_light_and_dark(page: Page) -> None:
    grounds = []
    for _ in range(2):
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.click("#theme")
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.evaluate("delete document.documentElement.dataset.theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[1]
    page.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.slow
def test_on_a_small_screen_nothing_lies_beside_the_screen(page: Page) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    page.click(f'#tokens [data-token="{TOKEN}"]')
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert 0 < page.evaluate("document.querySelector('#panel h2').getBoundingClientRect().top") < 640 - 40
    page.call("Emulation.clearDeviceMetricsOverride")
