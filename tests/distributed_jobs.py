"""Training jobs that every rank of a group runs: a whole model by the real Trainer, on its share of given batches."""

from __future__ import annotations

import copy
import resource
import signal
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from toys import config
from training.fits import loader, rows

from pkm_lightning.callbacks import Diagnostics
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.errors import CheckpointError, DataError
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.restoring import HostSnapshot

#: Rows of an optimizer step, over all ranks.
GLOBAL_BATCH = 8


class Losses(L.Callback):
    """The loss and norms of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def settings(*overrides: str, steps: int = 30) -> dict[str, Any]:
    """Composes a small model with the package's own optimizers, with norms low enough to clip."""
    return config(
        "model.dim=32", "model.ffn_dim=48", "model.n_heads=2", "model.n_kv_heads=2", "model.memory.n_keys=16",
        "model.memory.key_dim=16", "model.memory.knn=4", "model.memory.heads=2", f"trainer.max_steps={steps}",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "optim.clip_norm=0.5", "optim.table_clip_norm=0.05",
        "trainer.val_check_interval=null", "+trainer.limit_val_batches=0", "logger=none", "callbacks=none", *overrides,
    )  # fmt: skip


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Draws the same global batches for every number of ranks."""
    torch.manual_seed(7)
    return [rows(GLOBAL_BATCH, length=6) for _ in range(steps)]


def share(batch: dict[str, torch.Tensor], parts: int, part: int) -> dict[str, torch.Tensor]:
    """Returns the rows of one rank and micro-batch."""
    return {name: value.chunk(parts)[part] for name, value in batch.items()}


def fit(
    given: dict[str, Any],
    steps: int,
    done: int = 0,
    watching: Sequence[L.Callback] = (),
    without: Sequence[int] = (),
    **options: Any,
) -> tuple[LanguageModule, L.Trainer, list[dict[str, float]]]:
    """Trains up to `steps` optimizer steps, of which `done` are, on this rank's share; in one process on everything."""
    given = copy.deepcopy(given)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    given["trainer"]["devices"] = world
    accumulate = given["trainer"]["accumulate_grad_batches"]
    mine = [
        share(batch, world * accumulate, micro * world + rank)
        for number, batch in enumerate(batches(steps)[done:])
        if number not in without
        for micro in range(accumulate)
    ]
    losses = Losses()
    trainer = make_trainer(given, callbacks=[*watching, losses], loggers=[])
    module = LanguageModule(given)
    trainer.fit(module, loader(mine), **options)
    return module, trainer, losses.seen


class Refuse(L.Callback):
    """Refuses the step of a number."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.watch.judges.append(self._judge)

    def _judge(self, figures: dict[str, torch.Tensor]) -> bool:
        self.asked += 1
        return self.asked - 1 != self.number


def refuse(overrides: list[str], steps: int = 6, number: int = 2) -> list[str]:
    """Names of what differs between a run with a refused step and one that never saw that step's batch.

    The learning rate must be constant, since the runs differ in length.
    """
    given = settings(*overrides, steps=steps)
    found = [
        fit(given, steps, watching=[Refuse(number)])[:2],
        fit(settings(*overrides, steps=steps - 1), steps, without=[number])[:2],
    ]
    states = []
    for module, trainer in found:
        state: dict[str, Any] = dict(trainer.strategy.lightning_module_state_dict())
        kept = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        state |= {f"{n}.{key}": value for n, entry in kept.items() for key, value in entry.items()}
        state["schedule"] = trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"]
        states.append(state)
        del module
    return [name for name, value in states[0].items() if not _same(value, states[1][name])]


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.is_meta:
        return True
    one, other = (v.to_local() if isinstance(v, DTensor) else v for v in (one, other))
    return torch.equal(one, other)


def train(overrides: list[str], steps: int = 30) -> list[dict[str, float]]:
    return fit(settings(*overrides, steps=steps), steps)[2]


def train_and_save(overrides: list[str], steps: int, path: str) -> list[dict[str, float]]:
    _, trainer, losses = fit(settings(*overrides), steps)
    trainer.save_checkpoint(path)
    return losses


def resume_and_save(
    overrides: list[str], steps: int, path: str, saved_again: str, done: int = 0
) -> list[dict[str, float]]:
    """Takes up `path`, trains to `steps` optimizer steps since the start, and saves."""
    given = settings(*overrides)
    given["trainer"]["max_steps"] = steps
    _, trainer, losses = fit(given, steps, done=done, ckpt_path=path)
    trainer.save_checkpoint(saved_again)
    return losses


def train_unevenly(overrides: list[str], steps: int, sizes: list[int]) -> list[dict[str, float]]:
    """Trains as `train` does, but rank r has `sizes[r]` of the rows of each batch."""
    given = settings(*overrides, steps=steps)
    given["trainer"]["devices"] = dist.get_world_size()
    mine = [{name: value.split(sizes)[dist.get_rank()] for name, value in batch.items()} for batch in batches(steps)]
    losses = Losses()
    make_trainer(given, callbacks=[losses], loggers=[]).fit(LanguageModule(given), loader(mine))
    return losses.seen


class Endless(torch.utils.data.IterableDataset[Any]):
    """Batches without a length; `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(batches(self.count))


def train_on(overrides: list[str], counts: list[int], known: bool) -> str:
    """Trains on loaders of which rank r has `counts[r]` batches; returns the error that ends it."""
    given = settings(*overrides, steps=30)
    given["trainer"]["devices"] = dist.get_world_size()
    count = counts[dist.get_rank()]
    data: Any = batches(count) if known else Endless(count)
    try:
        make_trainer(given, callbacks=[], loggers=[]).fit(LanguageModule(given), loader(data))
    except DataError as error:
        return str(error)
    return ""


def train_half_and_save(overrides: list[str], steps: int, of: int, path: str) -> list[dict[str, float]]:
    """Trains the first `steps` of a run of `of` steps."""
    given = settings(*overrides, steps=of)
    stop = StopAfter(steps, path)
    given["trainer"]["devices"] = dist.get_world_size()
    mine = [share(batch, dist.get_world_size(), dist.get_rank()) for batch in batches(of)]
    losses = Losses()
    make_trainer(given, callbacks=[losses, stop], loggers=[]).fit(LanguageModule(given), loader(mine))
    return losses.seen


class StopAfter(L.Callback):
    """Saves and stops after a step."""

    def __init__(self, steps: int, path: str) -> None:
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def save_twice_on_a_full_disk(overrides: list[str], path: str) -> str:
    """Saves twice, the second time with files limited to 20 kB; returns the error."""
    _, trainer, _ = fit(settings(*overrides, steps=1), 1)
    trainer.save_checkpoint(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        trainer.save_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return ""


def save_in_the_background(overrides: list[str], here: str, there: str) -> None:
    """Saves a step at once and in the background, while two further steps change what was saved."""
    given = settings(*overrides, steps=4)
    given["trainer"]["devices"] = dist.get_world_size()
    mine = [share(batch, dist.get_world_size(), dist.get_rank()) for batch in batches(4)]
    both = SaveTwice(here, there)
    make_trainer(given, callbacks=[both], loggers=[]).fit(LanguageModule(given), loader(mine))


class SaveTwice(L.Callback):
    """Saves the second step twice, the second time in the background."""

    def __init__(self, here: str, there: str) -> None:
        self.here, self.there = here, there

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.here)
            strategy.asynchronous = True
            trainer.save_checkpoint(self.there)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.strategy.finish_saving()  # type: ignore[attr-defined]


class Repeat(L.Callback):
    """Keeps a step's state, goes back to it three steps later, and has the states after three steps of both times."""

    def __init__(self, kept_at: int) -> None:
        self.kept_at, self.batches = kept_at, 0
        self.after: list[HostSnapshot] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.kept_at == 0:
            self.state = HostSnapshot(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.kept_at:
            self.state = HostSnapshot(trainer, pl_module)
        if self.batches in (self.kept_at + 3, self.kept_at + 6):
            self.after.append(HostSnapshot(trainer, pl_module))
            if len(self.after) == 1:
                self.state.restore(trainer, pl_module)


def repeat(overrides: list[str], kept_at: int) -> list[str]:
    """Returns the names of what differs between three steps and the same three steps after going back."""
    given = settings(*overrides, steps=kept_at + 3)
    given["trainer"]["devices"] = world = dist.get_world_size() if dist.is_initialized() else 1
    mine = [share(batch, world, dist.get_rank() if world > 1 else 0) for batch in batches(kept_at + 3)]
    repeated = Repeat(kept_at)
    trainer = make_trainer(given, callbacks=[repeated], loggers=[])
    trainer.fit(LanguageModule(given), loader([*mine, *mine[kept_at:]]))
    first, again = repeated.after
    different = [name for name, value in first._weights.items() if not torch.equal(value, again._weights[name])]
    for (states, groups), (states_again, groups_again) in zip(first._optimizers, again._optimizers, strict=True):
        pairs = zip(states.values(), states_again.values(), strict=True)
        different += [key for one, other in pairs for key in one if not _same(one[key], other[key])]
        different += ["group"] * (groups != groups_again)
    return different + ["schedule"] * (first._schedules != again._schedules) + ["step"] * (first.step != again.step)


def watch_diagnostics(overrides: list[str]) -> dict[str, float]:
    """Returns the diagnostics of the model that the last of three steps logs."""
    seen = fit(settings(*overrides, steps=3), 3, watching=[Diagnostics(rows=1)])[2]
    return {name: value for name, value in seen[-1].items() if "vitals" in name}
