"""A cache folder is complete or absent, whatever is killed, damaged or started at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.data.cache import CacheKey, Source, open_cache, read_manifest
from pkm_lightning.data.cache_lock import cache_lock
from pkm_lightning.errors import DataError

KEY = CacheKey("toy", {"a": 1})

BUILDER = """
import sys, time
from pathlib import Path
from pkm_lightning.data.cache import CacheKey, open_cache
root, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(folder):
    (folder / "one").write_text("1")
    with (root / "builds").open("a") as file:
        file.write("x")
    time.sleep(seconds)
    (folder / "two").write_text("22")
    return []

print(open_cache(root, CacheKey("toy", {"a": 1}), build))
"""


def build(folder: Path) -> list[Source]:
    (folder / "one").write_text("1")
    (folder / "two").write_text("22")
    return [Source("here", licence="CC0", attribution="Nobody")]


def refuse(folder: Path) -> list[Source]:
    raise AssertionError("must not build")


def start(root: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", BUILDER, str(root), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_builds_once_and_prints_the_attribution(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        folder = open_cache(tmp_path / "deep" / "er", KEY, build)
    assert "Nobody (CC0)" in caplog.text
    assert open_cache(tmp_path / "deep" / "er", KEY, refuse) == folder
    manifest = read_manifest(folder)
    assert manifest["files"]["two"]["bytes"] == 2
    assert len(manifest["files"]["two"]["sha256"]) == 64
    assert manifest["arguments"] == {"a": 1}


def test_other_arguments_mean_another_folder(tmp_path: Path) -> None:
    assert open_cache(tmp_path, KEY, build) != open_cache(tmp_path, CacheKey("toy", {"a": 2}), build)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def change_manifest(folder: Path, **changes: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps({**read_manifest(folder), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: (folder / "two").write_text("2"), "two has another size than was written"),
    "flipped bit": (lambda folder: flip_bit(folder / "two"), "two has changed since it was written"),
    "removed": (lambda folder: (folder / "one").unlink(), "one cannot be read (No such file or directory)"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
    "a folder": (lambda folder: [(folder / "one").unlink(), (folder / "one").mkdir()], "one"),
    "not JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json has changed"),
    "not text": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json has changed"),
    "too deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest.json has changed"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json has changed"),
    "null": (lambda folder: (folder / "manifest.json").write_text("null"), "manifest.json has changed"),
    "files listed": (lambda folder: change_manifest(folder, sha256=None, files=["one"]), "manifest.json has changed"),
    "sizes alone": (
        lambda f: change_manifest(f, sha256=None, files={"one": {"bytes": 1}}),
        "manifest.json has changed",
    ),
    "sizes as texts": (lambda f: change_manifest(f, sha256=None, files={"one": 1}), "manifest.json has changed"),
    "other arguments": (lambda f: change_manifest(f, sha256=None, arguments={"a": 2}), "manifest.json has changed"),
    "other sources": (lambda folder: change_manifest(folder, sources=[]), "manifest.json has changed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_named_and_built_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_cache(tmp_path, KEY, build)
    damage, reason = DAMAGES[name]
    damage(folder)
    assert open_cache(tmp_path, KEY, build) == folder
    assert (folder / "one").read_text() + (folder / "two").read_text() == "122"
    assert read_manifest(folder)["sources"][0]["name"] == "here"
    assert f"is damaged ({reason}" in caplog.text
    assert "is built again" in caplog.text


def test_a_manifest_of_an_earlier_version_without_a_hash_of_its_own_is_accepted(tmp_path: Path) -> None:
    folder = open_cache(tmp_path, KEY, build)
    manifest = read_manifest(folder)
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_cache(tmp_path, KEY, refuse) == folder


def test_a_killed_build_leaves_nothing_behind_that_counts(tmp_path: Path) -> None:
    process = start(tmp_path, 60)
    while not (tmp_path / "builds").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (tmp_path / KEY.folder_name()).exists()
    folder = open_cache(tmp_path, KEY, build)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "one", "two"]
    assert not list(tmp_path.glob(".*.part"))


def test_what_nobody_continues_is_removed_unless_it_is_held(tmp_path: Path) -> None:
    """A build whose text was edited after a kill is one of another folder, which no command looks for."""
    names = ["text-1.0123abcd", "text-2.0123abcd", "text-3.0123abcd", "mine"]
    for name in names:
        (tmp_path / f".{name}.part").mkdir()
        os.utime(tmp_path / f".{name}.part", (1, 1))
    for name in ("text-1", "text-2", "text-3"):
        (tmp_path / f".{name}.lock").touch()
    os.utime(tmp_path / ".text-2.0123abcd.part")
    with cache_lock(tmp_path / ".text-3.lock"):
        open_cache(tmp_path, KEY, build)
    left = {path.name for path in tmp_path.glob(".*.part")}
    assert left == {f".{name}.part" for name in names[1:]}
    open_cache(tmp_path, CacheKey("toy", {"a": 2}), build)
    assert {path.name for path in tmp_path.glob(".*.part")} == left - {".text-3.0123abcd.part"}


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.5), start(tmp_path, 0.5)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert (tmp_path / "builds").read_text() == "x"


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*file/sub cannot be written .*PKM_LIGHTNING_CACHE"):
        open_cache(tmp_path / "file" / "sub", KEY, build)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill(folder: Path) -> list[Source]:
        with open("/dev/full", "w") as file:
            file.write("x")
        return []

    with pytest.raises(DataError, match="No space left on device"):
        open_cache(tmp_path, KEY, fill)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"], "nothing half-written stays"
    flip_bit(open_cache(tmp_path, KEY, build) / "two")
    with pytest.raises(DataError, match=r"No space left on device.* is damaged: two has changed"):
        open_cache(tmp_path, KEY, fill)


def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(tmp_path: Path) -> None:
    def read(folder: Path) -> list[Source]:
        (tmp_path / "text" / "gone.txt").read_text()
        return []

    with pytest.raises(DataError, match=r"text/gone\.txt cannot be read \(No such file or directory\)"):
        open_cache(tmp_path / "cache", KEY, read)
