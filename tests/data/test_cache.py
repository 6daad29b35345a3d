"""A cache folder is complete or absent, whatever is killed, damaged or started at the same time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkm_lightning.data.cache import CacheKey, Source, open_cache, read_manifest
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


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_cache(tmp_path, KEY, build)
    if damage == "truncate":
        (folder / "two").write_text("2")
    elif damage == "remove":
        (folder / "one").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert open_cache(tmp_path, KEY, build) == folder
    assert (folder / "one").read_text() + (folder / "two").read_text() == "122"
    assert "is damaged and is built again" in caplog.text


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
    assert not (tmp_path / KEY.folder_name()).exists()
