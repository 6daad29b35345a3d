"""The page of an inspection: one HTML file that a person clicks through, from a token to its slots to other readers.

Texts and figures travel as one packed block, so that no character of the record is markup anywhere. Style and program
are the files in `web/`; the page's policy allows these two by their digests and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

import jinja2

from pkm_lightning.errors import DataError
from pkm_lightning.inspection.packing import packed
from pkm_lightning.inspection.record import VERSION, Record

# In the order in which the browser reads them.
_PROGRAM = ("data", "elements", "colours", "text", "token_panel", "slot_panel", "overview_panel", "search", "page")


def render(record: Record) -> str:
    """Returns an HTML file that needs no network and no other file.

    Its size is at most 16 bytes per read (slot, weight and effect of 4 bytes each, in base64), 140 per token, 16 per
    slot that is listed and per reading of it, and the texts themselves; gzip leaves about two thirds of that.

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
        record=packed(record),
    )


def _file(name: str) -> str:
    return resources.files("pkm_lightning.inspection").joinpath("web", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Returns the source expression by which a Content-Security-Policy allows an inline style or program."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
