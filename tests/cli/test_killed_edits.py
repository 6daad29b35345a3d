"""`edit` killed before each change that it makes to the disk: the edits are as before or as after, never between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from small import Run

from pkm_lightning.build.loading import load
from pkm_lightning.checkpoints.edit_folder import edit_files
from pkm_lightning.cli.main import main

WRITE = ("edit", "run_dir=run", "facts=facts.jsonl", "max_steps=2", "drift_tokens=64", "rows_per_fact=4")
#: What is done to a run with the edits `a`, which is applied, and `b`, which is removed.
COMMANDS = {
    "write": (*WRITE, "name=c"),
    "write over a removed edit": (*WRITE, "name=b", "overwrite=true", "lr=0.5"),
    "remove": ("edit", "remove", "run_dir=run", "name=a"),
    "apply": ("edit", "apply", "run_dir=run", "name=b"),
    "merge": ("edit", "merge", "run_dir=run", "file=merged.safetensors", "overwrite=true"),
}
TABLE = "tables.0.weight"


def is_killed(folder: Path, moment: int, *command: str) -> bool:
    """Returns whether a command was killed before change number `moment` to files in `folder`; else it ended well."""
    child = os.fork()  # of a process that has imported everything, and that computes in one thread
    if child == 0:
        _run_and_kill(folder, moment, command)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _run_and_kill(folder: Path, moment: int, command: tuple[str, ...]) -> None:
    changes = 0

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if os.path.abspath(str(arguments[0])).startswith(str(folder)):
            changes += 1
            if changes > moment:
                os.kill(os.getpid(), signal.SIGKILL)

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.addaudithook(kill)
    GlobalHydra.instance().clear()
    try:
        main(command)
    except SystemExit as end:
        os._exit(1 if end.code else 0)
    os._exit(1)


def state() -> tuple[Any, ...]:
    """Returns which edits are applied and removed, the rows that a command uses, and those of the merged file."""
    edits, merged = Path("run/edits"), Path("merged.safetensors")
    return (
        sorted(edit_files(edits)),
        sorted(edit_files(edits, removed=True)),
        load("run").model.state_dict()[TABLE].numpy().tobytes(),
        load_file(merged)[TABLE].numpy().tobytes() if merged.exists() else None,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_leaves_edits_as_before_or_as_after(cli: Run, trained: Path, name: str) -> None:
    facts = [
        {"prompt": "The capital of Zorland is", "answer": "Quix"},
        {"prompt": "Ada Zem was born on", "answer": "May"},
    ]
    Path("facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    for edit in ("a", "b"):
        assert cli(*WRITE, f"name={edit}", "sample_seed=1").code == 0
    assert cli("edit", "remove", "run_dir=run", "name=b").code == 0
    shutil.copytree("run", "begin")
    checkpoints = {file: file.read_bytes() for file in (trained / "checkpoints").iterdir()}
    before, states, kills = state(), [], 0
    while is_killed(Path.cwd(), kills, *COMMANDS[name]):
        states.append(state())
        assert {file: file.read_bytes() for file in checkpoints} == checkpoints
        # The same command completes what was left, or has nothing left to do.
        cli(*COMMANDS[name])
        states.append(state())
        assert not list(trained.rglob("*.tmp"))
        shutil.rmtree("run")
        shutil.copytree("begin", "run")
        Path("merged.safetensors").unlink(missing_ok=True)
        kills += 1
    after = state()
    assert kills >= 3
    assert before != after
    assert all(left in (before, after) for left in states)
    assert {left == after for left in states[1::2]} == {True}
