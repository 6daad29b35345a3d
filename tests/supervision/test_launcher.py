"""The watch over ranks: the sentence about a failure, and the end of a process whose main thread hangs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from pkm_lightning.errors import ConfigError
from pkm_lightning.supervision import RANK_LOST, ErrorFolder, WatchedLauncher

HANGING = """
import subprocess, sys, time
import pkm_lightning.supervision.launcher as launcher
from lightning.fabric.plugins.environments import LightningEnvironment

launcher.GRACE_SECONDS = 0.5

class Launcher(launcher.WatchedLauncher):
    def _call_children_scripts(self):
        # The first rank is killed, the second would go on for minutes.
        commands = ["import os; os.kill(os.getpid(), 9)", "import time; print('up', flush=True); time.sleep(600)"]
        self.procs = [subprocess.Popen([sys.executable, "-c", command]) for command in commands]

ranks = Launcher(LightningEnvironment(), 3, 1)
ranks.on_hang = lambda failure: print(failure.sentence, ranks.procs[1].pid, flush=True)
ranks.launch(time.sleep, 600)
"""


def launched(code: str) -> WatchedLauncher:
    """Returns the launcher of one further rank, which ran `code` and has ended."""
    launcher = WatchedLauncher(LightningEnvironment(), 2, 1)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", code])]
    launcher._errors, launcher._is_rank_0 = ErrorFolder.make(), True
    launcher.procs[0].wait()
    return launcher


@pytest.mark.parametrize(
    ("code", "reason", "sentence", "exit_code"),
    [
        ("import os; os.kill(os.getpid(), 9)", None, "rank 1 was killed by SIGKILL", RANK_LOST),
        ("raise SystemExit(3)", None, "rank 1 ended with exit code 3", 3),
        ("raise SystemExit(143)", None, "rank 1 was stopped by SIGTERM", 143),
        ("raise SystemExit(2)", "DataError: no data.", "rank 1 failed: DataError: no data.", 2),
    ],
)
def test_the_sentence_about_a_failure(code: str, reason: str | None, sentence: str, exit_code: int) -> None:
    launcher = launched(code)
    if reason is not None and launcher._errors is not None:
        launcher._errors.write(1, reason)
    failure = launcher.failure()
    assert failure is not None
    assert (failure.sentence, failure.exit_code) == (sentence, exit_code)
    launcher.close(failed=True)
    assert ErrorFolder.inherited() is None


@pytest.mark.parametrize("code", ["pass", f"raise SystemExit({RANK_LOST})"])
def test_a_rank_that_succeeded_or_noticed_another_loss_is_not_lost(code: str) -> None:
    launcher = launched(code)
    assert launcher.await_failure(0.1) is None
    launcher.close(failed=False)


@pytest.mark.slow
def test_a_process_whose_main_thread_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGING]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == RANK_LOST, done.stderr
    *_, report = done.stdout.splitlines()
    sentence, _, pid = report.rpartition(" ")
    assert sentence == "rank 1 was killed by SIGKILL"
    assert not Path(f"/proc/{pid}").exists()


def test_a_reason_is_kept_and_reported_once(tmp_path: Path) -> None:
    errors = ErrorFolder(tmp_path / "errors", 1)
    (tmp_path / "errors").mkdir()
    errors.write(1, "first")
    errors.write(1, "second")
    assert errors.read(1) == "first"
    assert errors.read(2) is None
    assert [errors.claim_report(), errors.claim_report()] == [True, False]
    assert not (tmp_path / "errors").exists()


def test_ranks_that_do_not_fit_the_configuration_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    launcher = WatchedLauncher(TorchElasticEnvironment(), 3, 1)
    with pytest.raises(ConfigError, match=r"trainer.devices, trainer.num_nodes: .*world size \(4\)"):
        launcher.launch(time.time)
