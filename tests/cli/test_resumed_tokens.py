"""Runs of `fit` that are killed at random steps and go on with other ranks and workers see one undisturbed epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from shard_folders import text, write_folder

from pkm_lightning.data import TokensDataModule

#: Notes the targets that each rank is given, per optimizer step; a step that is repeated is noted again.
RECORDER = '''
import json
from pathlib import Path

from lightning.pytorch import Callback


class Recorder(Callback):
    """Notes what each rank reads."""

    def __init__(self, *, folder: str) -> None:
        self._folder = Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Appends the sequences of a micro-batch."""
        rows = [labels[valid].tolist() for labels, valid in zip(batch["labels"], batch["valid"])]
        with (self._folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, trainer.global_rank, rows]) + "\\n")
'''
GLOBAL = 8
OPTIONS = [
    "data=tokens", "data.packing=documents", "data.order_seed=0", "data.seq_len=16",
    f"data.global_batch_size={GLOBAL}", "ffn=dense",
    "model.dim=16", "model.n_layers=1", "trainer.log_every_n_steps=1", "trainer.val_check_interval=100",
    "callbacks.step_checkpoint.every_n_steps=2", "~callbacks.recall", "~callbacks.samples", "~callbacks.progress_bar",
    "logger=none", "+callbacks.recorder={_target_: recorder.Recorder, folder: seen}",
]  # fmt: skip
TWO_RANKS = ["strategy=ddp", "devices=2"]


def start(cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    (cwd / "seen").mkdir()
    command = [sys.executable, "-m", "pkm_lightning", "fit", *OPTIONS, *overrides]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def steps_of(seen: Path) -> dict[int, list[list[int]]]:
    """Returns the sequences of each optimizer step, rank by rank; what a killed sitting lost counts once."""
    by_step: dict[int, dict[int, list[list[int]]]] = {}
    files = sorted(seen.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith("]")]
    for step, rank, rows in lines:
        by_step.setdefault(step, {})[rank] = rows
    return {step: [row for _, rows in sorted(ranks.items()) for row in rows] for step, ranks in sorted(by_step.items())}


def kill_after(process: subprocess.Popen[str], seen: Path, step: int) -> None:
    """Kills all ranks as soon as `step` is noted, anywhere within it."""
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if any(record >= step for record in steps_of(seen)):
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def ended(process: subprocess.Popen[str]) -> None:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_kills_and_changes_of_world_size_lose_and_repeat_nothing(tmp_path: Path, workers: int) -> None:
    dice = random.Random(workers)
    documents = [text(f"document {i} {'goes on ' * dice.randrange(4)}") for i in range(120)]
    folder = write_folder(tmp_path, {"train": documents, "validation": documents[:3]})
    (tmp_path / "recorder.py").write_text(RECORDER)
    data = TokensDataModule(
        path=str(folder), val_path=None, test_path=None, packing="documents", seq_len=16, global_batch_size=GLOBAL,
        num_workers=0, order_seed=0, cache_dir=str(tmp_path / "cache"), prompts=[], prompts_file=None,
    )  # fmt: skip
    data.prepare_data()
    size = data.splits.order.size(0)
    steps = -(-size // GLOBAL) + 6
    options = [f"data.path={folder}", f"data.num_workers={workers}", f"trainer.max_steps={steps}"]

    ended(start(tmp_path, *options, "run_dir=whole"))
    # What a sitting notes after its last checkpoint, the next one repeats: each has a folder of its own.
    (tmp_path / "seen").rename(tmp_path / "of-whole")
    begin = 0
    for name, ranks in (("a", []), ("b", TWO_RANKS)):
        process = start(tmp_path, *options, *ranks, "run_dir=killed")
        kill_after(process, tmp_path / "seen", begin + dice.randrange(3, 6))
        begin = max(steps_of((tmp_path / "seen").rename(tmp_path / name)))
    ended(start(tmp_path, *options, "run_dir=killed", "strategy=single", "devices=1"))
    (tmp_path / "seen").rename(tmp_path / "c")

    undisturbed = steps_of(tmp_path / "of-whole")
    seen_at: dict[int, list[list[int]]] = {}
    for seen in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        for step, rows in steps_of(seen).items():
            if len(rows) == GLOBAL:  # else the kill came between the ranks
                assert rows == undisturbed[step], (seen.name, step)
                seen_at[step] = rows
    assert list(seen_at) == list(range(steps)), "no step is missing"
    assert min(steps_of(tmp_path / "b")) > 0, "the second sitting continued"
    epoch = [row for step in range(steps) for row in seen_at[step]][:size]
    targets = Counter(token for tokens, _ in documents for token in tokens[1:])
    assert Counter(token for row in epoch for token in row) == targets
