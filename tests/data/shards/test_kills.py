"""Processes that prepare data are killed at random moments, and several of them prepare the same at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from line_reader import content
from tree import ROOT


def start(files: Path, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "prepare_lines.py"), str(files), str(cache)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    draw = random.Random(0)
    for file in range(6):
        lines = [" ".join(f"{draw.getrandbits(24):x}" for _ in range(draw.randrange(1, 40))) for _ in range(800)]
        (folder / f"{file}.lines").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(files: Path, tmp_path: Path) -> None:
    undisturbed = start(files, tmp_path / "undisturbed")
    out, _ = undisturbed.communicate(timeout=300)
    expected = content(Path(out.split()[-1]))
    assert len(expected) > 100, len(expected)
    draw, cache, kills = random.Random(1), tmp_path / "killed", 0
    folder = cache / Path(out.split()[-1]).name
    while not folder.exists():
        process = start(files, cache)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        # Later each time, so that it gets through on a machine that has much to do.
        time.sleep(draw.random() * 0.1 * (kills + 1))
        if process.poll() is None:
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            kills += 1
        process.communicate(timeout=60)
        assert kills < 60
    assert kills > 3
    assert content(folder) == expected
    assert not list(cache.glob(".*.part"))


@pytest.mark.slow
def test_processes_that_prepare_the_same_wait_for_one_even_if_it_is_killed(files: Path, tmp_path: Path) -> None:
    processes = [start(files, tmp_path / "cache") for _ in range(3)]
    while not list((tmp_path / "cache").glob(".*.part/progress.json")):
        time.sleep(0.01)
    time.sleep(0.2)
    for process in processes[:2]:  # perhaps the one that builds
        process.kill()
    out, _ = processes[2].communicate(timeout=300)
    assert processes[2].returncode == 0
    alone, _ = start(files, tmp_path / "alone").communicate(timeout=300)
    assert content(Path(out.split()[-1])) == content(Path(alone.split()[-1]))
