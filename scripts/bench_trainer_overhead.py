"""The time that Lightning's Trainer and the default callbacks add to a plain loop over the same model and data.

Rounds are interleaved in one process; validation and the recall questions are off in both. Prints one line per round
and the ratio of the medians; `--out FILE.csv` appends the rounds with versions and date.

    python scripts/bench_trainer_overhead.py --steps 100 --rounds 5
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.build.run import ResolvedRun, resolve
from pkm_lightning.cli.assembly import assemble
from pkm_lightning.cli.loggers import attached
from pkm_lightning.model.loss import token_nll
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.clipping import clip_by_norm
from pkm_lightning.training.machine import versions


def configuration(overrides: list[str], steps: int, run_dir: str) -> dict[str, Any]:
    """Composes the default configuration without validation."""
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        fixed = [f"run_dir={run_dir}", f"trainer.max_steps={steps}", "~callbacks.recall"]
        config = compose("config", overrides=[*overrides, *fixed, "+trainer.limit_val_batches=0"])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return dict(plain)


def bare_loop(run: ResolvedRun, data: Any) -> float:
    """Returns seconds per step of the plain loop: loader, forward, backward, clipping, update, schedule."""
    config = run.config
    module = LanguageModule(config)
    module.configure_model()
    optimization = module.configure_optimizers()
    optimizer, scheduler = optimization["optimizer"], optimization["lr_scheduler"]["scheduler"]
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    batches = iter(data.train_dataloader())
    steps = config["trainer"]["max_steps"]
    started = time.perf_counter()
    for _ in range(steps):
        batch = next(batches)
        loss = token_nll(module.model, module(batch).hidden_BTD, batch["labels"]).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_by_norm([*groups["matrix"], *groups["gain"]], config["optim"]["clip_norm"])
        clip_by_norm(groups.get("table", []), config["optim"]["table_clip_norm"])
        optimizer.step()
        scheduler.step()
    return (time.perf_counter() - started) / steps


def through_trainer(run: ResolvedRun, data: Any) -> float:
    """Returns seconds per step of `trainer.fit`, from the first batch to the last."""
    assembly = assemble(run)
    with attached(assembly.trainer, run, resumed_step=None, ids={}):
        assembly.trainer.fit(LanguageModule(run.config), datamodule=data)
    # The throughput callback's clock starts at the first batch: building the Trainer's loops is no cost of a step.
    watches = [c.stopwatch.seconds for c in assembly.callbacks if hasattr(c, "stopwatch")]
    return watches[0] / run.config["trainer"]["max_steps"]


def main() -> None:
    """Runs the rounds, prints and, with `--out`, appends them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
    for number in range(arguments.rounds + 1):
        # Interleaved, so that a slow minute of the machine hits both.
        for name, way in (("bare", bare_loop), ("trainer", through_trainer)):
            with tempfile.TemporaryDirectory() as run_dir:
                run = resolve(configuration(arguments.overrides, arguments.steps, run_dir), training=True)
                run.data.prepare_data()
                run.data.setup("fit")
                seconds_per_step = way(run, run.data)
            if number:  # the first round warms up
                seconds[name].append(seconds_per_step)
                print(f"round {number} {name:8} {seconds_per_step * 1e3:8.2f} ms per step", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"trainer / bare = {medians['trainer'] / medians['bare']:.3f} (medians of {arguments.rounds} rounds)")
    if arguments.out:
        write(arguments.out, seconds, arguments.steps)


def write(path: Path, seconds: dict[str, list[float]], steps: int) -> None:
    """Appends one row per round."""
    numbers = enumerate(zip(seconds["bare"], seconds["trainer"], strict=True), start=1)
    append(path, ["round", "bare_s", "trainer_s"], [[n, *(f"{v:.6f}" for v in pair)] for n, pair in numbers], steps)


def append(path: Path, names: list[str], rows: list[list[Any]], steps: int) -> None:
    """Appends `rows` with the columns `names` to a CSV file, with date, steps, threads and versions."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(["date", *names, "steps", "threads", "torch", "lightning"])
        date, version = datetime.date.today().isoformat(), versions()
        for row in rows:
            writer.writerow([date, *row, steps, torch.get_num_threads(), version["torch"], version["lightning"]])


if __name__ == "__main__":
    main()
