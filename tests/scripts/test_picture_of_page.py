"""The script that takes the picture of a page: what it writes is small and as large as asked; it refuses no page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from browser import chromium
from inspection.example_record import example_record
from PIL import Image
from tree import ROOT

from pkm_lightning.inspection.page import render

SCRIPT = ROOT / "scripts" / "picture_of_page.py"


@pytest.mark.skipif(chromium() is None, reason="no Chromium on PATH or in the variable CHROMIUM")
def test_the_picture_shows_the_page(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    page.write_text(render(example_record(tokens=40)), encoding="utf-8")
    command = [sys.executable, SCRIPT, page, picture, "--address=#token=3&colour=help", "--size=900x600"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.size == (900, 600)
        colours = {colour for _, colour in image.convert("RGB").getcolors() or []}
    # The frame of the token that the address chooses is drawn after the record has been unpacked.
    assert min(sum(abs(a - b) for a, b in zip(colour, (11, 87, 208), strict=True)) for colour in colours) < 24


def test_a_page_that_is_missing_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "none.html", tmp_path / "picture.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "none.html is no file: write it with `inspect ... format=html`" in done.stderr
