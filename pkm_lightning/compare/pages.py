"""The pages of a report: report.html, one file that loads nothing, and report.md, from templates in this folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pkm_lightning.compare.headline import headline
from pkm_lightning.compare.plot_style import INK
from pkm_lightning.compare.plots import Plot
from pkm_lightning.compare.study import Study
from pkm_lightning.compare.table import Column, Table
from pkm_lightning.compare.tables import all_tables, failures

# Values of one key that a page shows before it counts the remaining ones.
_SHOWN_VALUES = 6
_PAGES = ("report.md", "report.html")
_PLOT_NOTE = (
    "Lines are means over seeds, bands show their range; points have 95% intervals over facts and seeds. Dense models "
    "are grey."
)
# A value that at least so many variants share may stand for all that are not named.
_SHARED_BY_MANY = 3


def render_pages(study: Study, plots: Sequence[Plot], mark: str) -> dict[str, str]:
    """Renders the pages.

    Args:
        study: what is shown.
        plots: drawn panels.
        mark: first line of report.md.

    Returns:
        The text of each page by file name.
    """
    content = {
        "mark": mark,
        "study": study,
        "headline": headline(study),
        "tables": all_tables(study),
        "plots": plots,
        "plot_note": _PLOT_NOTE,
        "failures": failures(study),
        "commands": [
            shlex.join(command)
            for comparison in study.comparisons
            for command in (*comparison.earlier, comparison.command)
        ],
        "unfair": [(d.key, _values_in_words(d.values), ", ".join(d.set_by)) for d in study.unfair],
        "fair": [(d.key, _values_in_words(d.values), d.kind) for d in study.differences if d.kind != "other"],
        "circumstances": _circumstances(study),
    }
    return {name: _environment(name).get_template(f"{name}.jinja").render(content) for name in _PAGES}


def _environment(name: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pkm_lightning.compare", "."),
        # Names and reasons come from the user's files: in HTML they must stay text.
        autoescape=name.endswith("html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    is_html = name.endswith("html")
    environment.filters.update(inline=_inline, breakable=_breakable, emphasised=_emphasised)
    environment.filters["cell"] = _cell_of_html if is_html else _cell
    environment.tests["starting"] = _is_start
    return environment


def _values_in_words(values: Mapping[str, tuple[str, ...]]) -> str:
    """Lists the values of a key, each with the variants that have it; one that many share comes last."""
    by_value: dict[tuple[str, ...], list[str]] = {}
    for variant, of_variant in values.items():
        by_value.setdefault(of_variant, []).append(variant)
    named = {texts: ", ".join(names) for texts, names in by_value.items()}
    common = max(by_value, key=lambda texts: len(by_value[texts]), default=())
    if 1 < len(by_value) <= _SHOWN_VALUES and len(by_value[common]) >= _SHARED_BY_MANY:
        del named[common]
        named[common] = "all others"
    shown = [f"{' | '.join(texts)} ({names})" for texts, names in list(named.items())[:_SHOWN_VALUES]]
    more = f"; and {len(by_value) - _SHOWN_VALUES} further values" if len(by_value) > _SHOWN_VALUES else ""
    return "; ".join(shown) + more


def _circumstances(study: Study) -> list[tuple[str, str]]:
    """Returns machine, software and data of the runs, with each value that occurs."""
    getters: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "device": lambda r: r.get("device"),
        "processes": lambda r: r.get("world_size"),
        "threads per process": lambda r: r.get("threads"),
        "precision": lambda r: r.get("precision"),
        "versions": lambda r: ", ".join(f"{k} {v}" for k, v in sorted((r.get("versions") or {}).items())),
        "commit": lambda r: r.get("commit"),
        "data": lambda r: str(r.get("data") or "")[:16],
        "started": lambda r: str(r.get("started") or "")[:10],
    }
    rows = []
    for label, get in getters.items():
        values = dict.fromkeys(str(get(run.record)) for run in study.runs if run.record)
        rows.append((label, "; ".join(value for value in values if value not in ("None", ""))))
    return [(label, text) for label, text in rows if text]


def _inline(svg: str) -> Markup:
    """Returns the drawing without XML header and fixed size, its ink replaced by the page's text colour."""
    drawing = svg[svg.index("<svg") :].replace(INK, "currentColor")
    head, rest = drawing.split(">", 1)
    return Markup(re.sub(r'\s(?:width|height)="[^"]*"', "", head) + ">" + rest)


def _cell(text: str) -> str:
    """Escapes `text` for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _emphasised(text: str, is_strong: bool) -> str:
    """Returns a cell of a Markdown table, with all but a bracket at its end in bold if it is to stand out."""
    number, _, bracket = text.partition(" (")
    return f"**{number}**{f' ({bracket}' if bracket else ''}" if is_strong else text


def _cell_of_html(text: str, table: Table, row: int, column: int) -> Markup:
    """Returns a cell of an HTML table, with a bracket at its end in smaller type."""
    number, _, bracket = text.partition(" (") if column else (text, "", "")
    is_start = _is_start(table.columns[column], table)
    places = {"strong": (row, column) in table.strong, "pale": (row, column) in table.pale, "start": is_start}
    names = " ".join(name for name, holds in places.items() if holds)
    opening = Markup('<td class="{}">').format(names) if names else Markup("<td>")
    inside = _breakable(number) if not column else escape(number)
    below = Markup(" <small>({}</small>").format(bracket) if bracket else Markup("")
    return opening + inside + below + Markup("</td>")


def _is_start(column: Column, table: Table) -> bool:
    """Returns whether a line parts a column from the one before: it opens a group, or follows one."""
    place = next(i for i, other in enumerate(table.columns) if other is column)
    return place > 0 and table.columns[place - 1].group != column.group


def _breakable(name: str) -> Markup:
    """Returns a name that may be broken after its underscores."""
    return Markup("_<wbr>").join(name.split("_"))
