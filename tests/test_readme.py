"""What README promises: its verbs, its extras, its make targets, and a first run from a fresh clone."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from pages import PAGES, README, commands, of_the_package, words
from tree import ROOT

from pkm_lightning.cli.main import VERBS


def test_the_readme_shows_all_verbs() -> None:
    assert set(VERBS) <= set(re.findall(r"`(\w+)`", README.read_text()))
    assert {words(command)[0] for page in PAGES for command in of_the_package(page)} <= set(VERBS)


def test_extras_that_pages_install_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [re.findall(r"pip install [^`\n]*\[([\w,]+)\]", page.read_text()) for page in PAGES]
    installed = {extra for found in named for group in found for extra in group.split(",")}
    assert {"cpu", "facts"} <= installed <= set(extras)


def test_make_lists_every_target_and_has_those_of_the_pages() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert len(targets) >= 8
    assert all(re.search(rf"^  {target} +\S", shown, re.M) for target in targets)
    # `make -n` prints what the targets would run, and fails where one does not exist.
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    named |= {command.split()[1] for page in PAGES for command in commands(page) if command.startswith("make ")}
    subprocess.run(["make", "-n", *sorted(named)], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_make_fit_from_a_fresh_clone(tmp_path: Path) -> None:
    """Keeps the whole promise: install, train on real facts, end with answers that are mostly right."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(["make", "fit"], cwd=tmp_path / "clone", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "clone" / "runs").rglob("run.json")
    record = json.loads(file.read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["recall"]["paraphrase"]["recall"] > 0.7
    assert record["metrics"]["recall"]["control"]["recall"] < 0.05
    assert record["peak_memory_bytes"] < 4e9
    second = subprocess.run(["make", "setup"], cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
    assert "pip" not in second.stdout
