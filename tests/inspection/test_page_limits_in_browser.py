"""The page in a real browser: strange texts, 10,000 tokens, and no way to the network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from inspection.example_record import example_record

from pkm_lightning.inspection.page import render
from pkm_lightning.inspection.record import ReaderRecord, ReadsRecord, Record, TextRecord

pytestmark = pytest.mark.slow  # seconds of a browser


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("</script><img src=x onerror=alert(1)>", None),
        ("a\u202egnp.exe", "aU+202Egnp.exe"),
        ("\u0301", "◌\u0301"),
        ("\u0627\u0644", None),
        ("👩\u200d👧", None),
        ("\u200d", "U+200D"),
        ("\ud83d", "U+D83D"),
        ("\x00\x07\x9b\n", "␀␇U+009B↵\n"),
        ("", "∅"),
        ("\ufffd", None),
    ],
)
def test_strange_texts_are_shown_as_what_they_are(tab: Page, tmp_path: Path, token: str, shown: str | None) -> None:
    record = example_record(texts=1)
    record.ablations.clear()
    record.texts[0].tokens[0] = (0, token)
    record.model = record.data = record.texts[0].title = token
    file = tmp_path / "page.html"
    file.write_text(render(record), encoding="utf-8")
    tab.open(f"{file.as_uri()}#token=0")
    expected = token if shown is None else shown
    assert tab.texts('#tokens [data-token="0"]') == [expected]
    assert tab.texts("#panel h2") == [f"Token 0 of 12: “{expected.strip(chr(10))}”"]
    assert tab.evaluate("document.querySelectorAll('img, script, style, iframe').length") == 2
    assert (tab.errors, tab.requests) == ([], [])


def bare(tokens: int, reads: int) -> Record:
    """Returns a record of one text with nothing that a record may lack."""
    readers = [ReaderRecord("layer1.slot", 1, "table0", "row", 10, 1, reads)] if reads else []
    columns = {"layer1.slot": ReadsRecord([[3] * reads] * tokens, [[0.5] * reads] * tokens)}
    unknown: list[Any] = [None] * tokens
    texts = [TextRecord("", [(1, "a")] * tokens, unknown, [7] * tokens, unknown, [[]] * tokens, unknown, [], columns)]
    return Record("", readers, texts if tokens else [], effects="none")


@pytest.mark.parametrize(
    ("record", "readout"),
    [
        (bare(2, 1), "Token 1 “a”: nothing follows, no figure"),
        (bare(0, 1), "The record has no text, or the model no memory."),
        (bare(2, 0), "The record has no text, or the model no memory."),
    ],
    ids=["no figures", "no text", "no memory"],
)
def test_what_a_record_lacks_is_left_out(tab: Page, tmp_path: Path, record: Record, readout: str) -> None:
    file = tmp_path / "page.html"
    file.write_text(render(record), encoding="utf-8")
    tab.open(f"{file.as_uri()}#token=1")
    assert tab.texts("#readout") == [readout]
    assert len(tab.texts("#panel [data-effect]")) == 0
    assert len(tab.texts("#panel [data-weight]")) == (1 if "figure" in readout else 0)
    assert (tab.errors, tab.requests) == ([], [])


def large_record(tokens: int) -> Record:
    """Returns a record of one text with 32 random reads per token in each of three layers."""
    record = example_record(tokens, texts=1)
    record.slots.clear()
    record.ablations.clear()
    record.readers = [ReaderRecord(f"layer{n}.slot", n, "table0", "row", 1 << 20, 4, 8) for n in (4, 8, 12)]
    draw = np.random.default_rng(0)
    for reader in record.readers:
        slots = draw.zipf(1.2, size=(tokens, 32)) % reader.slots
        weights, effects = draw.normal(size=(2, tokens, 32)).astype(np.float32)
        record.texts[0].reads[reader.name] = ReadsRecord(slots.tolist(), weights.tolist(), effects.tolist())
    return record


def test_ten_thousand_tokens_open_at_once(tab: Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(render(large_record(10_000)), encoding="utf-8")
    assert file.stat().st_size < 16e6
    tab.call("Performance.enable", timeDomain="threadTicks")  # its own time: what else runs does not count
    before = busy(tab)
    tab.open(file.as_uri())
    tab.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    assert busy(tab) - before < 2.0
    blocks = "[...document.querySelectorAll('.block')]"
    laid_out = f"{blocks}.filter((e) => e.firstChild.checkVisibility({{contentVisibilityAuto: true}})).length"
    assert 0 < tab.evaluate(laid_out) < tab.evaluate(f"{blocks}.length") / 3
    start = busy(tab)
    tab.click('#tokens [data-token="0"]')
    tab.press("End")
    assert tab.texts("#panel h2")[0].startswith("Token 9999 of 10000")
    box, token = (
        tab.evaluate(f"document.querySelector({one!r}).getBoundingClientRect().toJSON()")
        for one in ("#tokens", '[data-token="9999"]')
    )
    assert box["top"] <= token["top"] <= token["bottom"] <= box["bottom"]
    tab.click("#panel [data-slot]")
    assert 0 < len(tab.texts(".here button")) <= 40
    assert busy(tab) - start < 1.0
    assert (tab.errors, tab.requests) == ([], [])


def busy(page: Page) -> float:
    """Returns the seconds that the tab's main thread has worked."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def test_the_policy_stops_what_asks_for_the_network(tab: Page, tmp_path: Path) -> None:
    """The last of the tests: what it provokes is listed, so that an empty list means something."""
    file = tmp_path / "page.html"
    file.write_text(render(example_record()), encoding="utf-8")
    tab.open(file.as_uri())
    for attempt in (
        "fetch('https://example.invalid/').then(() => 'sent', () => 'stopped')",
        "new Promise((end) => { const image = new Image(); image.onload = () => end('sent'); "
        "image.onerror = () => end('stopped'); image.src = 'https://example.invalid/x.png'; })",
        "(() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1'; "
        "document.body.append(script); return window.ran ? 'ran' : 'stopped'; })()",
    ):
        assert tab.evaluate(attempt) == "stopped"
    end = time.monotonic() + 10
    while len(tab.errors) < 3 and time.monotonic() < end:
        tab.evaluate("1")
    assert sum("Content Security Policy" in error for error in tab.errors) >= 3
    tab.errors.clear()
    tab.requests.clear()
