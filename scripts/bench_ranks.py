"""Strong and weak scaling on the CPU: time per step and memory per process as the number of ranks grows.

Each line is one launch of `torchrun` with the package's Trainer, strategy and data on this machine: strong scaling
splits one global batch over the ranks, weak scaling gives every rank equally many sequences. Ranks share cores and
memory bandwidth, so the numbers show the cost of distribution, not the gain of more hardware. `--out FILE.csv` writes
them.

    python scripts/bench_ranks.py --out scripts/results/2026-11-21-bench-ranks.csv
    python scripts/bench_ranks.py --memory    # a table of 2**22 x 128 on 4 ranks
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.build.run import resolve
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.machine import versions

#: Name, strategy, overrides.
WAYS = (
    ("dense", "ddp", ["ffn=dense"]),
    ("none", "ddp", ["table.shard=none"]),
    ("dim", "ddp", ["table.shard=dim"]),
    ("row", "ddp", ["table.shard=row"]),
    ("dim", "fsdp", ["table.shard=dim"]),
    ("dim", "deepspeed_3", ["table.shard=dim"]),
)
_BATCH = 64
# Marks the line of a rank's output that holds its measurements.
_ANSWER = "figures: "


class StepTimes(L.Callback):
    """Callback that measures the seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Records the end of a step."""
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Returns the median of the steps after the first three, which warm up."""
        gaps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[3:])


def measure(overrides: list[str], steps: int) -> dict[str, Any]:
    """Trains `steps` steps in this rank.

    Collective: call on all ranks.

    Returns:
        Seconds per step, the largest peak of resident memory of a rank, and the sum over ranks, in bytes.
    """
    with tempfile.TemporaryDirectory() as folder, initialize_config_module("pkm_lightning.configs", version_base="1.3"):
        fixed = [f"run_dir={folder}", f"trainer.max_steps={steps}", "trainer.accelerator=cpu", "callbacks=none"]
        named = ["logger=none", "+trainer.limit_val_batches=0", *fixed, *overrides]
        config: Any = OmegaConf.to_container(compose("config", overrides=named), resolve=True)
        run = resolve(config)
        times = StepTimes()
        trainer = make_trainer(run.config, callbacks=[times], loggers=[])
        trainer.fit(LanguageModule(run.config), datamodule=run.data)
    # Linux reports KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks: list[Any] = [peak]
    if dist.is_initialized():
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)
    return {"seconds": times.median(), "peak_rank": max(peaks), "peak_all": sum(peaks)}


def launch(ranks: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """Runs `measure` in that many processes.

    Raises:
        RuntimeError: a rank failed.
    """
    worker = [__file__, "--worker", json.dumps({"overrides": overrides, "steps": steps})]
    command = [sys.executable, *worker]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *worker]
    # Equal threads per rank for every number of ranks: otherwise one rank alone would use all cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in ended.stdout.splitlines():
        if line.startswith(_ANSWER):
            figures: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
            return figures
    raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-2000:]}")


def scaling(counts: list[int], steps: int, rounds: int, extra: list[str]) -> list[dict[str, Any]]:
    """Measures strong and weak scaling of every way, as medians over `rounds` launches."""
    rows = []
    for kind in ("strong", "weak"):
        for table, strategy, overrides in WAYS:
            for ranks in counts:
                batch = _BATCH if kind == "strong" else _BATCH // max(counts) * ranks
                chosen = [] if ranks == 1 else [f"strategy={strategy}", f"trainer.devices={ranks}"]
                named = [*overrides, *chosen, f"data.global_batch_size={batch}", *extra]
                figures = [launch(ranks, named, steps) for _ in range(rounds)]
                seconds = statistics.median(figure["seconds"] for figure in figures)
                peak = max(figure["peak_rank"] for figure in figures)
                row = {"scaling": kind, "table": table, "strategy": strategy, "ranks": ranks, "batch": batch}
                row |= {"seconds_a_step": round(seconds, 4), "peak_bytes_a_rank": peak, "rounds": rounds}
                row["rows_a_second"] = round(batch / seconds, 1)
                rows.append(row)
                print(row, flush=True)
    # One rank of the same way is the reference of each line.
    for row in rows:
        alone = next(
            r for r in rows if r["ranks"] == 1 and all(r[k] == row[k] for k in ("scaling", "table", "strategy"))
        )
        row["against_one_rank"] = round(row["rows_a_second"] / alone["rows_a_second"], 3)
    return rows


def main() -> None:
    """Measures, prints and, with `--out`, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per launch")
    parser.add_argument("--rounds", type=int, default=3, help="launches per line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--memory", action="store_true", help="only a table of 2**22 x 128 on 4 ranks")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides")
    arguments = parser.parse_args()
    if arguments.worker:
        figures = measure(**json.loads(arguments.worker))
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(_ANSWER + json.dumps(figures), flush=True)
        return
    if arguments.memory:
        sizes = ["model.memory.n_keys=2048", "ffn.value_dim=128", "data.global_batch_size=16"]
        figures = launch(4, [*sizes, "strategy=ddp", "trainer.devices=4", *arguments.overrides], 6)
        each, together = figures["peak_rank"] / 1e9, figures["peak_all"] / 1e9
        print(f"2**22 x 128 on 4 ranks: {each:.2f} GB per rank, {together:.2f} GB in all")
        rows = [{"scaling": "memory", "table": "dim", "strategy": "ddp", "ranks": 4, **figures}]
    else:
        rows = scaling(arguments.ranks, arguments.steps, arguments.rounds, arguments.overrides)
    if arguments.out:
        version = versions()["torch"]
        with arguments.out.open("w", newline="") as file:
            date = datetime.date.today().isoformat()
            writer = csv.DictWriter(file, [*rows[0], "date", "torch", "cores"], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({**row, "date": date, "torch": version, "cores": os.cpu_count()})


if __name__ == "__main__":
    main()
