"""The page as a file: it holds every figure of the record, and no character of the record is markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from inspection.example_record import example_record

from pkm_lightning.errors import DataError
from pkm_lightning.inspection.page import render
from pkm_lightning.inspection.record import ReadsRecord, Record, SlotReading, SlotRecord, TextRecord

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "\ud83d",
    "\u202egnp.exe",
    "a\0b\x1b[31m",
)


class Parts(HTMLParser):
    """The contents of the elements of a page by tag and id, and its policy."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.contents: dict[str, str] = {}
        self.policy = ""
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self._open = f"{tag}#{attributes['id']}" if "id" in attributes else tag
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"] or ""

    def handle_data(self, data: str) -> None:
        self.contents[self._open] = self.contents.get(self._open, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def unpacked(page: str) -> tuple[dict[str, Any], bytes]:
    """Returns the JSON document of a page and the bytes of its columns."""
    block = gzip.decompress(base64.b64decode(Parts(page).contents["script#record"], validate=True))
    size = int.from_bytes(block[:4], "little")
    return json.loads(block[4 : 4 + size]), block[4 + size :]


def column(columns: bytes, place: list[Any]) -> np.ndarray:
    """Returns the values of a column from its planes: byte k of every value lies in plane k."""
    kind, start, n = place
    planes = [columns[start + k * n : start + (k + 1) * n] for k in range(4)]
    values = [bytes(plane[i] for plane in planes) for i in range(n)]
    return np.frombuffer(b"".join(values), dtype={"i4": "<i4", "f4": "<f4"}[kind])


def same(figures: np.ndarray, expected: Any) -> bool:
    return np.array_equal(figures, np.asarray(expected, dtype=np.float32).ravel(), equal_nan=True)


def listed(slot: SlotRecord) -> tuple[Any, ...]:
    """Returns what a page lists of a slot: reads, readings by the data, and facts."""
    data = [(*one[:3], float32(one.weight), *one[4:]) for one in slot.readers if isinstance(one.text, str)]
    return slot.reads, data, [(one.prompt, one.answer, float32(one.weight), one.reader) for one in slot.facts]


def readings(document: dict[str, Any], columns: bytes, table: str) -> dict[int, tuple[Any, ...]]:
    """Returns, by slot, what a page lists of it, in the order of the record's fields."""
    of_table = {name: column(columns, place).tolist() for name, place in document["slots"][table]["columns"].items()}
    names = [reader["name"] for reader in document["readers"]]
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for kind, texts in (("readings", document["excerpts"]), ("facts", document["questions"])):
        parts = [of_table[f"{kind}_{part}"] for part in ("text", "weight", "reader")]
        rows[kind] = []
        for number, weight, reader in zip(*parts, strict=True):
            split = 3 if kind == "readings" else 2
            text = texts[number]
            rows[kind].append((*text[:split], weight, names[reader], *text[split:]))
    starts = [0, 0]
    slots = {}
    for slot, reads, *ends in zip(*(of_table[n] for n in ("ids", "reads", "readings_end", "facts_end")), strict=True):
        cut = [rows[kind][a:b] for kind, a, b in zip(("readings", "facts"), starts, ends, strict=True)]
        slots[slot] = (reads, *cut)
        starts = ends
    return slots


def float32(x: float) -> float:
    return float(np.float32(x))


def test_the_page_holds_every_figure_of_the_record() -> None:
    record = example_record(tokens=40)
    document, columns = unpacked(render(record))
    content = json.loads(record.to_json())
    assert document["readers"] == content["readers"]
    for table, slots in record.slots.items():
        assert readings(document, columns, table) == {int(slot): listed(one) for slot, one in slots.items()}
    assert (document["model"], document["data"], document["effects"]) == (record.model, record.data, record.effects)
    vocabulary = [tuple(pair) for pair in document["vocabulary"]]
    for shown, text in zip(document["texts"], record.texts, strict=True):
        of_text = {name: column(columns, place) for name, place in shown["columns"].items()}
        assert shown["title"] == text.title
        assert [vocabulary[i] for i in of_text["tokens"]] == text.tokens
        assert of_text["targets"].tolist() == [-1 if target is None else target for target in text.targets]
        assert [vocabulary[i][0] for i in of_text["scored"]] == text.scored
        assert same(of_text["p"], text.p)
        assert same(of_text["p_without"], text.p_without)
        for name in ("top", "top_without"):
            rows = [one for row in getattr(text, name) for one in row]
            assert [vocabulary[i] for i in of_text[name]] == [row[:2] for row in rows]
            assert same(of_text[f"{name}_p"], [row[2] for row in rows])
        for reader in record.readers:
            reads, places = text.reads[reader.name], shown["reads"][reader.name]["columns"]
            assert column(columns, places["slots"]).tolist() == [slot for row in reads.slots for slot in row]
            assert same(column(columns, places["weights"]), reads.weights)
            assert same(column(columns, places["effects"]), reads.effects)
    for shown, ablation in zip(document["ablations"], record.ablations, strict=True):
        assert (shown["masked"], shown["loss_without"]) == (ablation.masked, ablation.loss_without)
        for of_text, p in zip(shown["texts"], ablation.p_without, strict=True):
            assert same(column(columns, of_text["columns"]["p_without"]), p)


def text_of(tokens: list[str], *, title: str = "text", reads: ReadsRecord | None = None) -> TextRecord:
    """Returns a text without figures."""
    n = len(tokens)
    ids = list(range(n))
    nothing = [float("nan")] * n
    by_name = {} if reads is None else {"layer1.slot": reads}
    return TextRecord(
        title, list(zip(ids, tokens, strict=True)), [None] * n, ids, nothing, [[]] * n, nothing, reads=by_name
    )


def hostile(text: str) -> Record:
    record = example_record()
    record.model = record.data = text
    record.texts[0] = text_of([text, "x"], title=text)
    record.ablations.clear()
    slot = next(iter(record.slots["table0"].values()))
    slot.readers = [SlotReading(text, 7, text, 0.5, "layer1.slot", text, text)]
    return record


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_record_is_markup(text: str) -> None:
    """Two pages differ in their packed block alone, which has the 64 letters and the padding of base64."""
    block = re.compile(r'(<script type="application/gzip" id="record">)([A-Za-z0-9+/]+={0,2})(</script>)')
    hostile_page, usual = render(hostile(text)), render(example_record())
    assert block.sub(r"\1\3", hostile_page) == block.sub(r"\1\3", usual)
    assert block.search(hostile_page)
    hostile_page.encode("utf-8")
    document, _ = unpacked(hostile_page)
    assert (document["model"], document["texts"][0]["title"], document["vocabulary"][0][1]) == (text, text, text)
    assert [text, 7, text, text, text] in document["excerpts"]


def test_the_policy_allows_the_style_and_the_program_of_the_page_and_no_network() -> None:
    page = render(example_record())
    parts = Parts(page)
    digests = {
        tag: base64.b64encode(hashlib.sha256(parts.contents[tag].encode()).digest()).decode()
        for tag in ("style", "script")
    }
    allowed = dict(directive.split(" ", 1) for directive in parts.policy.split("; "))
    assert allowed == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests['script']}'",
        "style-src": f"'sha256-{digests['style']}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not re.search(r"https?:|//\w+\.\w|\burl\(|@import", page)
    assert not re.search(r"\beval\b|\bFunction\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write", page)


def test_the_size_is_bounded() -> None:
    """Random figures do not compress: the bound of the docstring holds for them."""
    record = example_record(tokens=400, texts=1)
    record.slots.clear()
    record.ablations.clear()
    empty = example_record(tokens=1, texts=1)
    empty.slots.clear()
    empty.ablations.clear()
    reads = sum(len(row) for one in record.texts[0].reads.values() for row in one.slots)
    size = len(render(record)) - len(render(empty))
    assert 8 * reads < size < 16 * reads + 140 * 400


def short_column(record: Record) -> None:
    record.texts[0].p.pop()


def short_effects(record: Record) -> None:
    record.texts[1].reads["layer1.slot"].effects.pop()  # type: ignore[union-attr]


def other_version(record: Record) -> None:
    record.version = 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (short_column, r"text 'text 1' has 12 tokens, but 11 values of p"),
        (short_effects, r"text 'text 2' has layer1.slot slots of shape \(12, 8\), but effects of \(11, 8\)"),
        (other_version, r"the record has version 2; this page shows 1: inspect again"),
    ],
)
def test_a_damaged_record_is_refused(damage: Any, message: str) -> None:
    record = example_record()
    damage(record)
    with pytest.raises(DataError, match=message):
        render(record)


def test_the_same_record_gives_the_same_bytes() -> None:
    assert render(example_record()) == render(example_record())
