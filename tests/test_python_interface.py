"""The package as a library: what `import pkm_lightning` costs and offers, its examples, and the page about it."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks
from tree import ROOT

import pkm_lightning

TABLE = pkm_lightning._OFFERED
#: Of a bare import, the fastest of three: two clocks of a busy machine differ by more than the import takes.
IMPORT = """
import sys, time
start = time.process_time()
import pkm_lightning
print(time.process_time() - start, *(name for name in ("torch", "lightning", "numpy") if name in sys.modules))
"""


def test_a_bare_import_takes_no_time_and_imports_nothing() -> None:
    command = [sys.executable, "-c", IMPORT]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert all(len(line) == 1 for line in printed), printed
    assert min(float(line[0]) for line in printed) < 0.02


def test_editors_and_type_checkers_see_the_names_of_the_table() -> None:
    stub = ast.parse((ROOT / "pkm_lightning" / "__init__.pyi").read_text())
    seen = {}
    for statement in stub.body:
        if isinstance(statement, ast.ImportFrom):
            for name in statement.names:
                # An alias to itself makes a name of a stub public (PEP 484).
                assert name.asname == name.name
                seen[name.name] = str(statement.module)
    assert seen == {name: f"pkm_lightning.{module}" for name, module in TABLE.items()}


def test_names_are_listed_found_and_refused() -> None:
    assert dir(pkm_lightning) == sorted(["__version__", *TABLE])
    assert set(TABLE) < set(pkm_lightning.__all__)
    with pytest.raises(AttributeError, match="module 'pkm_lightning' has no attribute 'MemoryMinus'"):
        pkm_lightning.MemoryMinus  # noqa: B018 - the access is the test


@pytest.mark.parametrize("name", [name for name in TABLE if name != "NO_TARGET"])
def test_a_name_has_an_example_that_works_or_a_pointer_to_one(name: str) -> None:
    offered = getattr(pkm_lightning, name)
    assert offered.__module__ == f"pkm_lightning.{TABLE[name]}"
    text = offered.__doc__
    section = re.search(r"^ *Example:(.*?)(?=^ *[A-Z]\w+:$|\Z)", text, re.M | re.S)
    assert section, f"{name} has no example"
    if ">>>" in section[1]:
        globals_of = dict(vars(importlib.import_module(offered.__module__)))
        example = doctest.DocTestParser().get_doctest(text, globals_of, name, None, None)
        report: list[str] = []
        results = doctest.DocTestRunner().run(example, out=report.append)
        assert results.attempted, name
        assert not results.failed, "".join(report)
    elif "```python" not in section[1]:
        files = re.findall(r"`((?:docs|examples|tests|pkm_lightning)/[\w/.-]+)`", section[1])
        others = [other for other in re.findall(r"`(\w+)`", section[1]) if other in TABLE]
        assert all((ROOT / file).is_file() for file in files)
        assert files or others, f"the pointer of {name} leads nowhere"


def test_the_programs_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programs = blocks(ROOT / "docs" / "python.md", "python")
    assert len(programs) == 7
    names: dict[str, object] = {}
    for program in programs:
        exec(program, names)
