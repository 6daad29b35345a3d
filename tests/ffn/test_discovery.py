"""Discovery of plugins: one new file in the package is enough, and only that file is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import Constant, Reporter, dense

import pkm_lightning.ffn
from pkm_lightning.discovery import public_names
from pkm_lightning.ffn.base import FFNContext, FFNCost, FFNOutput, HasAfterStep, HasCost

SOURCE = """
from torch import nn
__all__ = ["Dropped"]
class Dropped(nn.Module): ...
class Unlisted(nn.Module): ...
"""


@pytest.fixture
def dropped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "zz_dropped.py").write_text(SOURCE)
    monkeypatch.setattr(pkm_lightning.ffn, "__path__", [*pkm_lightning.ffn.__path__, str(tmp_path)])
    yield "pkm_lightning.ffn.zz_dropped"
    sys.modules.pop("pkm_lightning.ffn.zz_dropped", None)
    vars(pkm_lightning.ffn).pop("zz_dropped", None)


def test_a_dropped_file_is_found_when_it_is_asked_for(dropped_file: str) -> None:
    assert dropped_file not in sys.modules
    assert pkm_lightning.ffn.Dropped.__module__ == dropped_file
    with pytest.raises(AttributeError, match="has no attribute 'Unlisted'"):
        _ = pkm_lightning.ffn.Unlisted


def test_finding_one_plugin_does_not_import_the_next(dropped_file: str) -> None:
    assert pkm_lightning.ffn.Dense.__name__ == "Dense"
    assert dropped_file not in sys.modules


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('__all__: list[str] = ["Dropped"]', ["Dropped"]),
        ('__all__ = ("Dropped", "Unlisted")', ["Dropped", "Unlisted"]),
        ("__all__ = [Dropped.__name__]", None),
    ],
)
def test_the_names_of_a_file_are_a_literal_list(dropped_file: str, line: str, names: list[str] | None) -> None:
    file = Path(pkm_lightning.ffn.__path__[-1]) / "zz_dropped.py"
    file.write_text(SOURCE.replace('__all__ = ["Dropped"]', line))
    if names is not None:
        assert public_names(dropped_file) == names
        return
    with pytest.raises(ImportError, match=rf"__all__ of {dropped_file} is no literal list of names"):
        public_names(dropped_file)


@pytest.mark.parametrize("name", ["Dens", "dense_", "_private", "__wrapped__"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'pkm_lightning.ffn' has no attribute '{name}'"):
        getattr(pkm_lightning.ffn, name)


@pytest.mark.parametrize("name", ["Dense", "MemoryPlus"])
def test_plugins_are_public(name: str) -> None:
    assert getattr(pkm_lightning.ffn, name).__module__.startswith("pkm_lightning.ffn.")


def test_optional_members_are_recognised() -> None:
    assert isinstance(dense(), HasCost)
    assert not isinstance(dense(), HasAfterStep)
    assert isinstance(Reporter(dim=4), HasAfterStep)
    assert not isinstance(Constant(), HasCost)


def test_outputs_do_not_share_their_empty_reports() -> None:
    """Keeps the shared defaults empty, since the transformer collects into dicts of its own."""
    first = FFNOutput(None)  # type: ignore[arg-type]
    assert (first.aux_losses, first.trace, first.step_stats, first.deferred_BTD) == ({}, {}, {}, None)
    assert FFNContext(None).observe is False  # type: ignore[arg-type]
    assert FFNCost(params=1, active_params=1, flops=2).table_params == 0
