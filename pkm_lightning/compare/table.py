"""A table of texts, which the HTML and Markdown templates lay out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """The heading of a column.

    Args:
        name: a few words, with the unit.
        group: heading over several neighbouring columns; empty for a column of its own.
    """

    name: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.group}: {self.name}" if self.group else self.name


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: a few words.
        note: explains the headings to a reader; may be empty.
        columns: headings; the first column names the rows.
        rows: texts. A bracket at the end of a text, such as an interval, is set in smaller type.
        strong: row and column of cells to emphasise.
        pale: row and column of cells that are to stand back.
        is_narrow: brackets stand in lines of their own, so that many columns have room.
    """

    title: str
    note: str
    columns: list[Column]
    rows: list[list[str]]
    strong: frozenset[tuple[int, int]] = field(default=frozenset())
    pale: frozenset[tuple[int, int]] = field(default=frozenset())
    is_narrow: bool = False

    @property
    def groups(self) -> list[tuple[str, list[Column]]]:
        """Neighbouring columns of one group, in order; a column without a group stands alone."""
        groups: list[tuple[str, list[Column]]] = []
        for column in self.columns:
            if column.group and groups and groups[-1][0] == column.group:
                groups[-1][1].append(column)
            else:
                groups.append((column.group, [column]))
        return groups


def columns(*names: str, group: str = "") -> list[Column]:
    """Returns columns of one group."""
    return [Column(name, group) for name in names]
