"""A folder of the user's is filled once; nothing in it that is something else is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from line_corpus import line_corpus
from line_reader import content

from pkm_lightning.data import cache
from pkm_lightning.data.prepared import check_out, describe_difference, prepare_data
from pkm_lightning.data.sharded import CorpusDataModule
from pkm_lightning.errors import ConfigError, DataError


@pytest.fixture
def data(tmp_path: Path) -> CorpusDataModule:
    (tmp_path / "a.lines").write_text("".join(f"document {i}\n" for i in range(30)))
    return line_corpus(tmp_path / "a.lines", tmp_path / "cache")


def test_the_folder_holds_what_the_cache_would_hold(data: CorpusDataModule, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mine"
    assert prepare_data(data, "lines", out, overwrite=False) == (out, True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare_data(data, "lines", out, overwrite=True) == (out, False)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    folder, is_new = prepare_data(data, "lines", None, overwrite=False)
    assert (folder.parent, is_new) == (tmp_path / "cache", True)
    assert content(folder) == content(out)
    assert data.cache_folder() == folder
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")] == ["mine"]


def test_other_data_are_replaced_only_when_asked(data: CorpusDataModule, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    prepare_data(data, "lines", out, overwrite=False)
    other = line_corpus(tmp_path / "a.lines", tmp_path / "cache", val_fraction=0.5)
    before = content(out)
    with pytest.raises(ConfigError) as error:
        prepare_data(other, "lines", out, overwrite=False)
    assert str(error.value) == (
        f"out={out} holds other data: val_fraction is 0.2 there, and 0.5 now; give another folder, or overwrite=true."
    )
    assert content(out) == before
    assert prepare_data(other, "lines", out, overwrite=True) == (out, True)
    assert json.loads((out / "manifest.json").read_text())["arguments"]["val_fraction"] == 0.5


def test_a_damaged_folder_is_filled_again(data: CorpusDataModule, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    prepare_data(data, "lines", out, overwrite=False)
    before = content(out)
    (out / "train-00000.tokens").write_bytes(b"x" + before["train-00000.tokens"][1:])
    assert prepare_data(data, "lines", out, overwrite=False) == (out, True)
    assert content(out) == before


def test_large_data_are_compared_by_size_when_a_run_starts_and_whole_by_prepare(
    data: CorpusDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = data.cache_folder()
    before = content(folder)
    monkeypatch.setattr(cache, "VERIFIED_BYTES", 10)
    (folder / "train-00000.tokens").write_bytes(b"x" + before["train-00000.tokens"][1:])
    with caplog.at_level("INFO"):
        assert line_corpus(tmp_path / "a.lines", tmp_path / "cache").cache_folder() == folder
    assert "only the sizes are compared; prepare compares the content" in caplog.text
    assert content(folder) != before
    assert prepare_data(data, "lines", None, overwrite=False) == (folder, True)
    assert content(folder) == before
    (folder / "train-00000.tokens").write_bytes(b"x")
    line_corpus(tmp_path / "a.lines", tmp_path / "cache").cache_folder()
    assert content(folder) == before


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda out: out.write_text("x"), "is a file; give a folder"),
    "other files": (
        lambda out: [out.mkdir(), (out / "thesis.doc").write_text("x")],
        "holds thesis.doc, which is not of",
    ),
    "another file beside": (lambda out: (out / "thesis.doc").write_text("x"), "holds thesis.doc, which is not of"),
    "a manifest of something else": (
        lambda out: [out.mkdir(), (out / "manifest.json").write_text("{}")],
        "holds manifest.json, which is not of prepared data",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_something_else_is_refused_whatever_overwrite_is(
    name: str, data: CorpusDataModule, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    if name == "another file beside":
        prepare_data(data, "lines", out, overwrite=False)
    make, message = FOREIGN[name]
    make(out)
    with pytest.raises(ConfigError, match=message):
        prepare_data(data, "lines", out, overwrite=True)
    assert out.is_file() or not (out / "thesis.doc").exists() or (out / "thesis.doc").read_text() == "x"


def test_a_place_that_cannot_be_written_is_named(data: CorpusDataModule, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"out=.*file/mine cannot be written .*; free space there, or give another fol"):
        prepare_data(data, "lines", tmp_path / "file" / "mine", overwrite=False)


def test_an_empty_folder_is_filled(data: CorpusDataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    assert prepare_data(data, "lines", tmp_path / "mine", overwrite=False)[1]
    assert "damaged" not in caplog.text
    check_out(tmp_path / "mine", data.cache_key(), overwrite=False)


@pytest.mark.parametrize(
    ("there", "here", "shown"),
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"seed": 0, "a": 1}, {"seed": 2, "a": 1}, "seed is 0 there, and 2 now"),
        ({}, {"lines": 2}, "lines is null there, and 2 now"),
        ({"train files": [["/a", 3, 5]]}, {"train files": [["/a", 3, 6]]}, "/a has changed"),
        ({"train files": [["/a", 3, 5]]}, {"train files": [["/a", 3, 5], ["/b", 1, 1]]}, "/b is new"),
        ({"train files": [["/a", 3, 5], ["hub"]]}, {"train files": [["/a", 3, 5]]}, "hub is left out"),
        ({"x files": [["/a", 1], ["b"]]}, {"x files": [["b"], ["/a", 1]]}, "the order of the files has changed"),
        ({"test files": [["/a", 3, 5]]}, {}, "/a is left out"),
    ],
)  # fmt: skip
def test_differences_are_named(there: dict[str, Any], here: dict[str, Any], shown: str) -> None:
    assert describe_difference(there, here) == shown
