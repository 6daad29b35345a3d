"""The page is for every eye and for screen readers: contrast, colour vision, names of what can be reached."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from browser import Page
from inspection.example_record import example_record
from PIL import Image

from pkm_lightning.inspection.page import render

pytestmark = pytest.mark.slow  # seconds of a browser

#: Of the text on its ground: level AA of the Web Content Accessibility Guidelines 2.2, section 1.4.3.
CONTRAST = 4.5
#: Of two colours in sRGB, 0 to 442: neighbours on the scale of a colouring are 10 apart.
APART = 60.0


@pytest.fixture
def page(tab: Page, tmp_path: Path) -> Page:
    file = tmp_path / "page.html"
    file.write_text(render(example_record(tokens=40)), encoding="utf-8")
    tab.open(file.as_uri())
    return tab


def swatches(page: Page) -> np.ndarray:
    """Returns the colours of the legend as they are drawn, one row per step."""
    box = page.evaluate("document.querySelector('.swatches').getBoundingClientRect().toJSON()")
    clip = {name: box[name] for name in ("x", "y", "width", "height")} | {"scale": 1}
    png = base64.b64decode(page.call("Page.captureScreenshot", format="png", clip=clip)["data"])
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)
    middles = ((np.arange(9) + 0.5) * pixels.shape[1] / 9).astype(int)
    return pixels[pixels.shape[0] // 2, middles]


def luminance(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("colour", ["surprise", "help"])
def test_text_stands_out_from_every_colour(page: Page, theme: str, colour: str) -> None:
    page.evaluate(f"document.documentElement.dataset.theme = {theme!r}; location.hash = 'colour={colour}'")
    page.wait(f"document.getElementById('colour').value === {colour!r}")
    ink = page.evaluate("getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number)")
    lights = luminance(np.vstack([swatches(page), np.array(ink, dtype=float)]))
    ratios = (np.maximum(lights[:-1], lights[-1]) + 0.05) / (np.minimum(lights[:-1], lights[-1]) + 0.05)
    assert ratios.min() >= CONTRAST, ratios.round(1)


@pytest.mark.parametrize("vision", ["none", "protanopia", "deuteranopia", "tritanopia"])
def test_both_signs_differ_for_every_kind_of_colour_vision(page: Page, vision: str) -> None:
    page.evaluate("location.hash = 'colour=help'")
    page.wait("document.getElementById('colour').value === 'help'")
    page.call("Emulation.setEmulatedVisionDeficiency", type=vision)
    colours = swatches(page)
    page.call("Emulation.setEmulatedVisionDeficiency", type="none")
    assert np.linalg.norm(colours[0] - colours[-1]) > APART
    assert np.linalg.norm(colours[[0, -1]] - colours[4], axis=1).min() > APART


@pytest.mark.parametrize("address", ["", "#token=3", "#token=3&slot=7"])
def test_everything_that_can_be_reached_has_a_name(page: Page, address: str) -> None:
    page.evaluate(f"location.hash = {address!r}")
    page.wait("document.querySelector('#panel h2')")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "listbox", "option", "region", "complementary", "columnheader"}
    named = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]
    assert {role for role, _ in named} >= {"button", "combobox", "listbox", "option"}
    assert [role for role, name in named if not name] == []
