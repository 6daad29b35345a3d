"""Stands for `fit` where runs are of no interest but what a comparison does with them: a run that has ended at once.

The file fates.json of the working directory says what becomes of a run, by a part of its directory's path: a test loss,
"killed" or "failed". Without it the loss is best at a learning rate of 6e-3.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from run_folders import FakeRun

FFNS = {"dense": "Dense", "moe": "MoE", "memory_plus": "MemoryPlus"}


def main(arguments: list[str]) -> int:
    """Writes the run's directory."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    folder = Path(given["run_dir"].strip("'"))
    fates = json.loads(Path("fates.json").read_text()) if Path("fates.json").exists() else {}
    fate = next((fate for part, fate in fates.items() if part in str(folder)), None)
    rate, steps = float(given.get("optim.lr", 0.006)), int(given.get("trainer.max_steps", 100))
    loss = fate if isinstance(fate, float) else 1 + abs(math.log(rate / 0.006))
    record: dict[str, Any] = {"metrics": {"test/loss": loss}}
    record |= {} if fate == "failed" else {"throughput": {"steps_per_sec": 50.0}}
    record |= {"killed": {"status": "running"}, "failed": {"status": "failed", "reason": "no luck"}}.get(str(fate), {})
    shutil.rmtree(folder, ignore_errors=True)
    config = {"optim": {"lr": rate}, "trainer": {"max_steps": steps}}
    run = FakeRun("", int(given["seed"]), ffn=FFNS[given["ffn"]], config=config, record=record)
    run.write(folder.parent, folder.name)
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"error: {fate}" if fate == "failed" else "done")
    return int(fate == "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
