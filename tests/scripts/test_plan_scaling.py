"""docs/scaling.md shows the output of its script."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tree import ROOT


@pytest.mark.slow
def test_the_document_holds_the_tables_of_the_script() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "plan_scaling.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=300).stdout
    document = (ROOT / "docs" / "scaling.md").read_text()
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    assert [row for row in rows if row not in document] == []
