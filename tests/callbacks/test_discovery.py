"""Callbacks are found by their names in the files of the folder, and imported only when they are asked for."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pkm_lightning.callbacks
from pkm_lightning.build.instantiate import target_class
from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.step_progress_bar import StepProgressBar


def test_the_package_imports_nothing_before_a_callback_is_asked_for() -> None:
    code = "import sys, pkm_lightning.callbacks; print('lightning' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False False", done.stderr


def test_only_the_file_that_lists_a_class_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aaa_first_of_all.py").write_text("RunInterrupted = 0\nraise AssertionError('imported')")
    monkeypatch.setattr(pkm_lightning.callbacks, "__path__", [str(tmp_path), *pkm_lightning.callbacks.__path__])
    assert pkm_lightning.callbacks.SlotUsage.__module__ == "pkm_lightning.callbacks.slot_usage"
    assert pkm_lightning.callbacks.RunInterrupted.__module__ == "pkm_lightning.callbacks.step_checkpoint"


def test_the_public_names_are_listed() -> None:
    assert {"SlotUsage", "Instability", "StepCheckpoint"} <= set(dir(pkm_lightning.callbacks))
    names: dict[str, object] = {}
    exec("from pkm_lightning.callbacks import *", names)
    assert names["SlotUsage"] is pkm_lightning.callbacks.SlotUsage
    assert "find_public" not in names


@pytest.mark.parametrize("name", ["Diagnostics", "Vitals"])
def test_saved_configurations_name_their_classes(name: str) -> None:
    """Resolves `Vitals` too, the name of `Diagnostics` in configurations of versions before 0.2."""
    target = f"pkm_lightning.callbacks.{name}"
    assert target_class({"_target_": target}, "callbacks.x") is pkgutil.resolve_name(target) is Diagnostics
    assert pkgutil.resolve_name("pkm_lightning.callbacks.StepProgressBar") is StepProgressBar


@pytest.mark.parametrize("name", ["SlotUsag", "instability_", "EventLog", "_private", "__wrapped__"])
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'pkm_lightning.callbacks' has no attribute '{name}'"):
        getattr(pkm_lightning.callbacks, name)
