"""A data source is found by dropping one file into the package; nothing else is edited and nothing else is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pkm_lightning.data

# It sorts before every module of the package, so that a search that imports what it passes would fail.
SOURCE = """
import no_such_package
__all__ = ["Dropped"]
class Dropped: ...
class Unlisted: ...
"""


@pytest.fixture(autouse=True)
def _dropped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "aa_dropped.py").write_text(SOURCE)
    monkeypatch.setattr(pkm_lightning.data, "__path__", [str(tmp_path), *pkm_lightning.data.__path__])
    yield
    sys.modules.pop("pkm_lightning.data.aa_dropped", None)


@pytest.mark.parametrize(
    "name", ["FactsDataModule", "JsonlDataModule", "TextDataModule", "TokenDataModule", "Tokenizer"]
)
def test_public_names_are_found_without_importing_other_sources(name: str) -> None:
    assert getattr(pkm_lightning.data, name).__name__ == name


def test_a_source_that_lacks_its_package_fails_only_when_it_is_used() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _ = pkm_lightning.data.Dropped


@pytest.mark.parametrize("name", ["TextDataModul", "Unlisted", "_private", "__wrapped__"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'pkm_lightning.data' has no attribute '{name}'"):
        getattr(pkm_lightning.data, name)
