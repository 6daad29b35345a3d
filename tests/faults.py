"""Faults that are injected into a real training, and a training whose loss has a floor to come back to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed_jobs as jobs
import lightning as L
import torch
import torch.distributed as dist
from toys import VOCAB
from training.fits import loader

from pkm_lightning.callbacks import Instability, RunInterrupted, StepCheckpoint, diagnostics
from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.model.loss import token_nll
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import local_weights

#: A run of a small model, long enough for a spike window to fill before the fault.
STEPS, AT = 48, 26
SMALL = ("model.n_layers=1", "placement=all", "model.dim=16", "model.ffn_dim=16", "strategy=single")
#: A run whose loss has come close to its floor before the fault.
LONG_STEPS, LONG_AT = 160, 80


def rows(count: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns a batch in which half of the targets follow from the token, so that the loss ends well above zero."""
    ids_BT = torch.randint(VOCAB, (count, length))
    noise_BT = torch.randint(VOCAB, (count, length))
    return {
        "input_ids": ids_BT,
        "labels": torch.where(torch.rand(count, length) < 0.5, (7 * ids_BT + 3) % VOCAB, noise_BT),
    }


class Losses(L.Callback):
    """The loss of each step that was tried, and the step counter after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.trainer = trainer
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0)))
        self.steps.append(trainer.global_step)


class Fault(L.Callback):
    """A fault in the micro-batch number `at`."""

    def __init__(self, at: int = AT) -> None:
        self.at = at


class NotANumber(Fault):
    """The hidden states of one micro-batch are not finite."""

    hook: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.is_due(trainer, batch_idx):
            self.hook = pl_module.model.norm.register_forward_hook(lambda *a: a[-1] * float("nan"))

    def is_due(self, trainer: L.Trainer, batch_idx: int) -> bool:
        return batch_idx == self.at

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook is not None:
            self.hook.remove()


class HugeGradient(Fault):
    """The gradients of one step are a million times too large."""

    batches = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.batches == self.at:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1e6)
        self.batches += 1


class HugeRate(Fault):
    """Ten steps have a hundredfold learning rate."""

    batches = 0
    before: list[float] | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.at <= self.batches < self.at + 10:
            self.before = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= 100
        self.batches += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.before is not None:
            for group, rate in zip(trainer.optimizers[0].param_groups, self.before, strict=True):
                group["lr"] = rate
            self.before = None


class InfiniteRow(Fault):
    """A row of the table that is read becomes infinite."""

    row = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.watch.watchers.append(self._watch)

    def _watch(self, traces: Any, batch: Any) -> None:
        ids = next(iter(traces.values()))["slot_ids"].flatten()
        self.row = int(ids.mode().values)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            table = pl_module.model.value_tables[0]
            with torch.no_grad():
                table.weight[self.row % len(table.weight)] = float("inf")


def watching(path: Path, **changes: Any) -> Instability:
    """Returns the callback with short windows."""
    usual: dict[str, Any] = {
        "window": 20, "warm_up": 10, "threshold": 10.0, "policies": {}, "limits": {}, "restore": "memory",
        "keep_every_n_steps": 8, "settle_steps": 3, "max_tries": 12, "lr_factor": 1.0,
    }  # fmt: skip
    return Instability(path=str(path / "events.jsonl"), **{**usual, **changes})


def long_watch(path: Path, **changes: Any) -> Instability:
    """Returns the callback with the windows of a run of `LONG_STEPS`."""
    return watching(path, **{"window": 40, "warm_up": 20, "keep_every_n_steps": 20, "settle_steps": 5, **changes})


def everything(policy: str) -> dict[str, str]:
    """Returns one policy for all events of a step."""
    return dict.fromkeys(("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike"), policy)


def train(
    path: Path,
    *callbacks: L.Callback,
    overrides: Sequence[str] = SMALL,
    steps: int = STEPS,
    save_every: int = 10,
    without: range = range(0),
    **options: Any,
) -> tuple[LanguageModule, Losses, L.Trainer]:
    """Trains with the callbacks, with more data than steps, since some batches are refused.

    Args:
        path: folder of checkpoints and events.
        callbacks: what watches, and the faults.
        overrides: of the configuration.
        steps: optimizer steps.
        save_every: steps between checkpoints.
        without: numbers of batches that are left out of the data.
        options: of `Trainer.fit`.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    settings = jobs.settings("ffn=memory_plus", *overrides, steps=steps)
    settings["trainer"]["devices"] = world
    torch.manual_seed(3)
    data = [jobs.share(rows(), world, rank) for _ in range(steps + 40)]
    data = [batch for number, batch in enumerate(data) if number not in without]
    losses = Losses()
    checkpoints = StepCheckpoint(dirpath=str(path / "checkpoints"), every_n_steps=save_every)
    trainer = make_trainer(settings, callbacks=[*callbacks, losses, checkpoints], loggers=[])
    module = LanguageModule(settings)
    trainer.fit(module, loader(data), **options)
    return module, losses, trainer


def train_long(path: Path, *callbacks: L.Callback) -> tuple[LanguageModule, Losses, L.Trainer]:
    """Trains a model of the usual size for `LONG_STEPS`."""
    return train(path, *callbacks, overrides=("strategy=single",), steps=LONG_STEPS, save_every=30)


def events(path: Path) -> list[dict[str, Any]]:
    """Returns the events that `train` has written."""
    file = path / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def assert_finite(path: Path, *names: str) -> None:
    """Asserts that `train` has left these checkpoints, of finite weights."""
    files = sorted((path / "checkpoints").glob("*.ckpt"))
    assert [file.name for file in files] == list(names)
    for file in files:
        state = torch.load(file, weights_only=False)["state_dict"]
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@torch.no_grad()
def loss_on_other_rows(module: LanguageModule) -> float:
    """Returns the mean loss on rows that no training has seen, always the same."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(9)
    batch = rows(400)
    torch.set_rng_state(generator_state)
    module.eval()
    nll_M = token_nll(module.model, module(batch).hidden_BTD, batch["labels"])
    return float(nll_M.mean())


def spread(overrides: list[str], path: str, restore: str) -> dict[str, Any]:
    """Trains with one gradient on one rank that is not finite; returns the losses and steps of this rank."""
    here = Path(path)
    watch = long_watch(here, policies=everything("rollback"), restore=restore, keep_every_n_steps=10, settle_steps=0)
    fault = [NotANumber(37)] if dist.get_rank() == 1 else []
    module, losses, trainer = train(here, *fault, watch, overrides=tuple(overrides), steps=45, save_every=30)
    norms = [float(value.norm()) for value in local_weights(module).values()]
    return {"losses": losses.losses, "steps": losses.steps, "final": trainer.global_step, "norms": norms}


def extreme_of_ranks() -> list[float]:
    """Returns what all ranks take for the extremes of theirs, of which the second has no numbers."""
    broken = float("nan") if dist.get_rank() == 1 else 1.0
    values = {
        "a_max": torch.tensor(broken),
        "b_min": torch.tensor(broken),
        "c_max": torch.tensor(1.0 + dist.get_rank()),
    }
    module: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=2), device=torch.device("cpu"))
    return [float(value) for value in diagnostics._over_ranks({0: values}, module)[0].values()]


def stop_one_rank(overrides: list[str], path: str) -> str:
    """Requests a stop on the second rank alone, at a step that neither logs nor saves; returns the reason."""
    here = Path(path)

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 7 and trainer.global_rank == 1:
                next(c for c in trainer.callbacks if isinstance(c, StepCheckpoint)).request_stop("SIGTERM")  # type: ignore[attr-defined]

    try:
        train(here, Ask(), watching(here), overrides=(*overrides, "trainer.log_every_n_steps=40"), steps=20)
    except RunInterrupted as stop:
        return str(stop)
    return "went on"
