"""A tab of a real browser, for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Page, browser_page, chromium


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """Yields an empty tab; without a browser the test is skipped."""
    program = chromium()
    if program is None:
        pytest.skip("no browser: install Chromium (Debian: chromium), or name one in the variable CHROMIUM")
    with browser_page(program) as page:
        yield page
