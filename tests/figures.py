"""The figures of README and docs/ and the results that they come from: how `figures.csv` is read and compared.

A row of it is one figure: a page, text in which `{}` stands for the figure, and where its value lies. An empty `text`
is the next `{}` of the text above; an empty `page`, `record`, `rows` or `column` is that of the row above.

page, text     where the figure stands; a text stands once in its page, however its lines are broken
record         a CSV under scripts/results/, or what a text is that holds no measured figure: one of `NOT_MEASURED`
rows           conditions that rows fulfil, `column=value;column!=value`
column, how    the value: of the only such row, or the mean, median, min, max or spread (max - min) of several
against        `/ CONDITIONS` or `- CONDITIONS`: divided by, or less, the value of the rows that differ in these
               conditions, of which one may be the name of another column; `each / ...`: row by row, in their order
factor         what the value is multiplied by, such as 100, 1e-6 or 1/60

A text without measured figures has no `{}` and may be a heading, which stands for its whole section.

Also a command: `python tests/figures.py` lists what differs, `--write` puts the values of the records into the pages.
"""

from __future__ import annotations

import csv
import functools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from operator import sub, truediv
from pathlib import Path

NOT_MEASURED = {
    "setting": "a default, a limit, a size, a definition or a goal",
    "computed": "follows from sizes",
    "published": "somebody else's figure",
    "sample": "output that shows what a command prints",
    "no record": "measured, but nothing committed holds it",
}
HOW: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
    "spread": lambda values: max(values) - min(values),
}
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven"),
    *("eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen"),
)
_WORD = rf"\b(?:{'|'.join(_WORDS)})\b"
_DIGITS = r"(?<![\w.^])(?<!\w-)[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
#: What `{}` stands for; where the record has a bound, so has the prose.
FIGURE = rf"((?:(?:at least|>=)\s+)?(?:{_DIGITS}|{_WORD}))"
_UNIT = r"(?:%|x\b(?!\s\d)|(?:points?|percent|s|ms|seconds?|minutes?|hours?|[KMGT]i?B|tokens?/s|nats?|times)\b)"
#: What looks measured: numbers with a unit, decimals (but versions and arXiv's), cells of tables with numbers only.
MEASURED = re.compile(
    rf"{_DIGITS}[\s-]?{_UNIT}|{_WORD}\s(?:points?|percent|seconds?|minutes?|hours?)\b"
    r"|(?<![\w.^])(?<!\w-)(?!\d{4}\.\d{5})\d[\d,]*\.\d+(?![\w.]|-\w)"
    r"|(?<=\|)(?=[^|\n]*\d[^|\n]*\d)(?:[\s\d.,/()%+<>=-]|to|M)+(?=\|)"
)
#: Code, except for output, which has no language; targets of links.
_NO_PROSE = re.compile(r"```\w+\n.*?```|`[^`\n]*`|\]\([^)\n]*\)|^\[\w+\]: .*?$", re.DOTALL | re.MULTILINE)


class FigureError(ValueError):
    """An entry of `figures.csv` whose text or whose value does not exist, or exists several times."""


@dataclass(frozen=True)
class Source:
    """Where the value of a figure lies: columns of `figures.csv`."""

    record: str
    rows: str
    column: str
    how: str
    against: str
    factor: str

    def __str__(self) -> str:
        return " | ".join(filter(None, (self.record, self.rows, self.column, self.how, self.against)))


@dataclass(frozen=True)
class Passage:
    """A text of a page with the sources of its figures, in their order; `line` is that of `figures.csv`."""

    line: int
    page: str
    text: str
    record: str
    sources: list[Source]


@dataclass(frozen=True)
class Figure:
    """A figure as it stands in a page, from `start` to `end`, and what its record has."""

    start: int
    end: int
    text: str
    value: float
    is_bound: bool

    @property
    def number(self) -> Decimal:
        """The number in the text."""
        number = self.text.split()[-1].replace(",", "")
        return Decimal(_WORDS.index(number) if number in _WORDS else number)

    @property
    def places(self) -> int:
        """Digits after the point."""
        return -int(self.number.as_tuple().exponent)

    @property
    def is_right(self) -> bool:
        """Whether the value, rounded to the digits of the text, is its number, and a bound if it is one there."""
        # The margin is for values that lie on a half: 0.7855 is written as 78.5% or 78.6%.
        near = abs(self.value - float(self.number)) <= 0.5 * 10.0**-self.places * (1 + 1e-6)
        return near and self.is_bound == self.text.startswith(("at least", ">="))

    def corrected(self) -> str:
        """Returns the value with the digits, the sign and the separators of the text."""
        prefix = "at least " if self.text.startswith("at least") else ">= "
        return f"{prefix * self.is_bound}{self.value:{'+' * ('+' in self.text)},.{self.places}f}"


def passages(file: Path) -> list[Passage]:
    """Returns the texts of `file` with the sources of their figures."""
    entries: list[Passage] = []
    above = dict.fromkeys(("page", "record", "rows", "column"), "")
    with file.open(encoding="utf-8", newline="") as opened:
        for line, row in enumerate(csv.DictReader(opened), 2):
            above = {name: row[name] or value for name, value in above.items()}
            record, rows, column = above["record"], above["rows"], above["column"]
            if row["text"]:
                entries.append(Passage(line, above["page"], row["text"], record, []))
            if record not in NOT_MEASURED:
                entries[-1].sources.append(Source(record, rows, column, row["how"], row["against"], row["factor"]))
    return entries


@functools.cache
def _rows(record: Path) -> list[dict[str, str]]:
    with record.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def _cells(record: Path, conditions: dict[str, str], column: str) -> list[str]:
    """Returns what `column` has in the rows that fulfil the conditions; the name of one that excludes ends with `!`."""
    rows = [
        row
        for row in _rows(record)
        if all((row.get(name.rstrip("!")) == value) != name.endswith("!") for name, value in conditions.items())
    ]
    if not rows or column not in rows[0]:
        raise FigureError(f"{record.parent.name}/{record.name} has no column {column!r} in rows with {conditions}")
    return [row[column] for row in rows if row[column]]


def value_of(source: Source, results: Path) -> tuple[float, bool]:
    """Returns the value that the record has, and whether it is a lower bound (`>=4.02`)."""
    record = results / source.record
    conditions = dict(condition.split("=", 1) for condition in source.rows.split(";"))
    cells = _cells(record, conditions, source.column)
    values = [float(cell.lstrip(">=")) for cell in cells]

    def one(numbers: Sequence[float]) -> float:
        if not source.how and len(numbers) != 1:
            raise FigureError(f"{source} has {len(numbers)} values, and `how` is empty")
        return HOW[source.how](numbers) if source.how else numbers[0]

    if source.against:
        operator, _, changes = source.against.removeprefix("each ").partition(" ")
        changed = dict(change.split("=", 1) for change in changes.split(";") if "=" in change)
        column = next((change for change in changes.split(";") if "=" not in change), source.column)
        others = [float(cell) for cell in _cells(record, conditions | changed, column)]
        if not source.against.startswith("each "):
            values, others = [one(values)], [one(others)]
        values = [{"/": truediv, "-": sub}[operator](a, b) for a, b in zip(values, others, strict=True)]
    return one(values) * float(Fraction(source.factor or 1)), any(cell.startswith(">=") for cell in cells)


def place(passage: Passage, page: str) -> re.Match[str]:
    """Returns where the text of `passage` stands in `page`, its figures as groups."""
    if passage.text.startswith("#"):
        level = len(passage.text.split()[0])
        pattern = rf"^{re.escape(passage.text)}$.*?(?=^#{{1,{level}}} |\Z)"
    else:
        parts = (r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in passage.text.split("{}"))
        pattern = FIGURE.join(parts)
    matches = list(re.finditer(pattern, page, re.DOTALL | re.MULTILINE))
    if len(matches) != 1:
        raise FigureError(f"{passage.page} has {len(matches)} places with the text {passage.text!r}; one is needed")
    if len(matches[0].groups()) != len(passage.sources):
        raise FigureError(f"{passage.text!r} has {len(matches[0].groups())} figures, and {len(passage.sources)} rows")
    return matches[0]


def uncovered(page: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """Yields line and text of every figure outside the spans that looks measured."""
    prose = _NO_PROSE.sub(lambda match: re.sub(r"[^\n]", "_", match.group()), page)
    for match in MEASURED.finditer(prose):
        if not any(start < match.end() and match.start() < end for start, end in spans):
            yield page.count("\n", 0, match.start()) + 1, " ".join(match.group().split())


def problems(root: Path, file: Path, pages: Sequence[str], *, write: bool = False) -> list[str]:
    """Returns what is wrong: figures that their record does not have, texts that are gone, figures without an entry."""
    wrong = []
    entries = passages(file)
    for name in sorted({*pages, *(passage.page for passage in entries)}):
        page, spans, corrections = (root / name).read_text(encoding="utf-8"), [], []
        for passage in (passage for passage in entries if passage.page == name):
            try:
                match = place(passage, page)
                spans.append(match.span())
                for group, source in enumerate(passage.sources, 1):
                    value, is_bound = value_of(source, root / "scripts" / "results")
                    figure = Figure(*match.span(group), match.group(group), value, is_bound)
                    if not figure.is_right:
                        corrections.append(figure)
                        wrong.append(f"{name}: {figure.text} in {passage.text!r} is {value:.6g} in {source}")
            except (FigureError, OSError) as error:
                wrong.append(f"{file.name}:{passage.line}: {error}")
        wrong += [f"{name}:{line}: {text!r} stands in no text of {file.name}" for line, text in uncovered(page, spans)]
        if write:
            for figure in sorted(corrections, key=lambda figure: -figure.start):
                page = page[: figure.start] + figure.corrected() + page[figure.end :]
            (root / name).write_text(page, encoding="utf-8")
    return wrong


ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
FILE = ROOT / "tests" / "figures.csv"

if __name__ == "__main__":
    print(*problems(ROOT, FILE, PAGES, write="--write" in sys.argv), sep="\n")
