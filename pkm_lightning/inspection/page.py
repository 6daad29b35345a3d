"""The page of an inspection: one HTML file that a person clicks through, from a token to its slots to other readers.

Texts and figures travel as one packed block, so that no character of the record is markup anywhere. Style and program
are the files in `web/`; the page's policy allows these two by their digests and no network at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from pkm_lightning.errors import DataError
from pkm_lightning.inspection.record import VERSION, AblationRecord, ReadsRecord, Record, TextRecord

# In the order in which the browser reads them.
_PROGRAM = ("data", "elements", "colours", "text", "token_panel", "slot_panel", "overview_panel", "search", "page")
#: In a column of tokens or slots: there is none.
_NOTHING = -1
#: Four times the ratio that gzip needs for figures; higher levels gain 1% and take three times as long.
_GZIP_LEVEL = 6

_Top = Sequence[Sequence[tuple[int, str, float]]]


def render(record: Record) -> str:
    """Returns an HTML file that needs no network and no other file.

    Its size is at most 16 bytes per read (slot, weight and effect of 4 bytes each, in base64), 130 per token, and the
    record's own JSON of slots; in practice two thirds of that.

    Raises:
        DataError: a record of another version, or one whose columns differ in length.
    """
    if record.version != VERSION:
        raise DataError(f"the record has version {record.version}; this page shows {VERSION}: inspect again.")
    style = _file("page.css")
    program = "".join(_file(f"{name}.js") for name in _PROGRAM)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pkm_lightning.inspection", "web"),
        # Nothing of the record is in the template's content; style and program are files of this package.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        policy=f"default-src 'none'; script-src {_digest(program)}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        program=program,
        record=_Packing().pack(record),
    )


def _file(name: str) -> str:
    return resources.files("pkm_lightning.inspection").joinpath("web", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Returns the source expression by which a Content-Security-Policy allows an inline style or program."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Packing:
    """The record as one block: the length of a JSON document, the document, and the columns that it names by place."""

    def __init__(self) -> None:
        self._columns: list[bytes] = []
        self._length = 0
        self._vocabulary: dict[tuple[int, str], int] = {}

    def pack(self, record: Record) -> str:
        """Returns the block, compressed, in base64."""
        content: dict[str, Any] = {
            "model": record.model,
            "effects": record.effects,
            "data": record.data,
            "readers": [vars(reader) for reader in record.readers],
            "texts": [self._text(text) for text in record.texts],
            "ablations": [self._ablation(ablation, record.texts) for ablation in record.ablations],
            "slots": {table: {slot: vars(one) for slot, one in slots.items()} for table, slots in record.slots.items()},
        }
        content["vocabulary"] = list(self._vocabulary)
        document = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False).encode("ascii")
        block = b"".join([len(document).to_bytes(4, "little"), document, *self._columns])
        return base64.b64encode(gzip.compress(block, _GZIP_LEVEL, mtime=0)).decode("ascii")

    def _text(self, text: TextRecord) -> dict[str, Any]:
        length = len(text.tokens)
        known = {token: (token, content) for token, content in text.tokens}
        known |= {token: (token, content) for row in text.top for token, content, _ in row}
        scored = [known.get(token, (token, f"#{token}")) for token in text.scored]
        # One id may have several texts: bytes of a character are shown by their neighbours.
        for t, (token, _) in enumerate(text.tokens[1:]):
            if text.scored[t] == token:
                scored[t] = text.tokens[t + 1]
        columns = {
            "tokens": self._tokens(text.tokens),
            "targets": self._integers([_NOTHING if target is None else target for target in text.targets]),
            "scored": self._tokens(scored),
            "p": self._figures(text.p),
            "p_without": self._figures(text.p_without),
            **self._top("top", text.top),
            **self._top("top_without", text.top_without),
        }
        for name in ("tokens", "targets", "scored", "p", "p_without"):
            if columns[name][2] != length:
                raise DataError(f"text {text.title!r} has {length} tokens, but {columns[name][2]} values of {name}.")
        reads = {name: {"columns": self._reads(text, name, reads)} for name, reads in text.reads.items()}
        return {"title": text.title, "columns": columns, "reads": reads}

    def _reads(self, text: TextRecord, name: str, reads: ReadsRecord) -> dict[str, tuple[str, int, int]]:
        shape = np.shape(reads.slots)
        for column, values in (("weights", reads.weights), ("effects", reads.effects)):
            if values is not None and np.shape(values) != shape:
                raise DataError(
                    f"text {text.title!r} has {name} slots of shape {shape}, but {column} of {np.shape(values)}."
                )
        columns = {"slots": self._integers(reads.slots), "weights": self._figures(reads.weights)}
        return columns if reads.effects is None else {**columns, "effects": self._figures(reads.effects)}

    def _ablation(self, ablation: AblationRecord, texts: Sequence[TextRecord]) -> dict[str, Any]:
        of_texts = [
            {"columns": {"p_without": self._figures(p), **self._top("top_without", top)}}
            for p, top, _ in zip(ablation.p_without, ablation.top_without, texts, strict=True)
        ]
        named = ("masked", "loss", "loss_without", "recall", "recall_without")
        return {**{name: getattr(ablation, name) for name in named}, "texts": of_texts}

    def _top(self, name: str, top: _Top) -> dict[str, tuple[str, int, int]]:
        width = max((len(row) for row in top), default=0)
        padded = [[*row, *[None] * (width - len(row))] for row in top]
        tokens = [[_NOTHING if one is None else self._token(one[0], one[1]) for one in row] for row in padded]
        figures = [[math.nan if one is None else one[2] for one in row] for row in padded]
        return {name: self._integers(tokens), f"{name}_p": self._figures(figures)}

    def _tokens(self, tokens: Iterable[tuple[int, str]]) -> tuple[str, int, int]:
        return self._integers([self._token(*token) for token in tokens])

    def _token(self, token: int, text: str) -> int:
        return self._vocabulary.setdefault((token, text), len(self._vocabulary))

    def _integers(self, values: Sequence[Any]) -> tuple[str, int, int]:
        return self._column("i4", np.asarray(values, dtype=np.int64).astype("<i4", casting="same_kind"))

    def _figures(self, values: Sequence[Any]) -> tuple[str, int, int]:
        # None, which JSON has for numbers that are not finite, becomes NaN.
        return self._column("f4", np.asarray(values, dtype=np.float64).astype("<f4"))

    def _column(self, kind: str, values: np.ndarray) -> tuple[str, int, int]:
        """Stores a column and returns its place: kind, first byte, number of values."""
        # All first bytes, then all second bytes: gzip packs those of figures a quarter smaller that way.
        planes = values.reshape(-1, 1).view(np.uint8).T.tobytes()
        place = (kind, self._length, values.size)
        self._columns.append(planes)
        self._length += len(planes)
        return place


def _finite(value: Any) -> Any:
    """Returns `value` with None for numbers that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
