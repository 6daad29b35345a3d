"""Takes the picture of an inspection's page that docs/inspecting.md shows, in a headless Chromium.

    python -m pkm_lightning inspect run_dir=runs/facts format=html out=page.html ...
    python scripts/picture_of_page.py page.html docs/inspecting.png --address '#token=12&colour=help'

The browser is that of the variable CHROMIUM, or `chromium` on PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

#: Of the picture: a third of the bytes of one without a palette.
COLOURS = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the picture and prints its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--address", default="", help="what is chosen on the page, as its address has it")
    parser.add_argument("--size", default="1280x800", help="of the window, in pixels")
    options = parser.parse_args(arguments)
    if not options.page.is_file():
        parser.error(f"page={options.page} is no file: write it with `inspect ... format=html`")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        parser.error("no chromium on PATH: install one, or name it in the variable CHROMIUM")
    width, height = options.size.split("x")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        picture = Path(folder) / "picture.png"
        command = [
            program,
            *("--headless", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # which Chromium asks of that user
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            # The page unpacks its record after it has loaded; the browser's clock runs ahead until it has.
            "--virtual-time-budget=10000",
            f"--screenshot={picture}",
            f"{options.page.resolve().as_uri()}{options.address}",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(picture) as image:
            # The steps of the scale are close colours: k-means holds them apart.
            palette = image.convert("RGB").quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE)
            palette.save(options.picture, optimize=True)
    print(f"{options.picture}: {options.picture.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
