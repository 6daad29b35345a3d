"""The benchmark of `prepare` counts the text that it was given, and the memory of the process that it runs."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tree import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("bench_prepare")


def test_texts_of_the_machine_come_once_each(bench: Any, tmp_path: Path) -> None:
    text = "def function():\n    return 'some text of a program'\n" * 20
    contents = {"a.py": text, "b.py": text.replace("    ", "  "), "c.md": text.upper(), "d.bin": text.lower()}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "small.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 1_000)
    (tmp_path / "link.md").symlink_to("c.md")
    found = [content.decode() for content in bench.installed_texts([str(tmp_path), str(tmp_path)])]
    assert sorted(found) in (sorted([text, text.upper()]), sorted([text.replace("    ", "  "), text.upper()]))


@pytest.mark.parametrize(("megabytes", "sizes"), [(5.0, [4_000_000, 1_000_000]), (4.0, [4_000_000]), (0.5, [500_000])])
def test_a_corpus_is_as_large_as_asked_for(megabytes: float, sizes: list[int], bench: Any, tmp_path: Path) -> None:
    texts = iter(lambda: b"x" * 9_999 + b"\n", b"")
    corpus = bench.write_corpus(texts, megabytes, tmp_path / "corpus")
    assert [round(file.stat().st_size, -5) for file in sorted(corpus.iterdir())] == sizes
    few = bench.write_corpus(islice(texts, 3), megabytes, tmp_path / "few")
    assert [file.stat().st_size for file in few.iterdir()] == [30_006]


def test_memory_is_that_of_a_process_and_not_of_the_one_that_started_it(bench: Any) -> None:
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    with subprocess.Popen(["sleep", "5"]) as process:
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            pass
        assert 0 < bench.memory(process.pid, "VmHWM") < 0.1
        assert process.pid in bench.children(os.getpid())
        process.kill()
    assert bench.memory(process.pid, "VmHWM") == 0
    assert bench.children(process.pid) == []


def test_lines_of_other_columns_go_into_another_file(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    for line in ({"a": 1}, {"a": 2}, {"a": 3, "b": 4}):
        bench.write_line(out, line)
    assert out.read_text() == "a\n1\n2\n"
    (other,) = tmp_path.glob("rows-*.csv")
    assert other.read_text() == "a,b\n3,4\n"


@pytest.mark.slow
def test_it_prepares_as_much_text_as_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"Sentence {i} of many.\n" for i in range(4_000)))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    command = [sys.executable, str(ROOT / "scripts" / "bench_prepare.py"), "a.txt", "--megabytes", "0.3"]
    out = [*command, "--vocab-size", "300", "--out", "rows.csv"]
    subprocess.run(out, cwd=tmp_path, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    with (tmp_path / "rows.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["text"], row["vocab_size"]) == ("a.txt", "300")
    size = 4 * (tmp_path / "a.txt").stat().st_size
    assert size / 4 < int(row["tokens"]) < size
    assert 0.1 < float(row["peak_gb"]) < 2
    assert float(row["cpu_seconds"]) > 1
