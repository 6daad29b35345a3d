"""Faults that are injected into a real training, and a training whose loss has a floor to come back to."""

from __future__ import annotations

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
from pkm_lightning.training.diagnostics import held_weights

STEPS = 160
AT = 80


def rows(count: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    """Half of the targets follow from the token, the others from nothing: the loss ends well above zero."""
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
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0)))
        self.steps.append(trainer.global_step)


class NotANumber(L.Callback):
    """The hidden states of one micro-batch are not finite."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT:
            self.hook = pl_module.model.norm.register_forward_hook(lambda *a: a[-1] * float("nan"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT:
            self.hook.remove()


class HugeGradient(L.Callback):
    """The gradients of one step are a million times too large."""

    batches = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.batches == AT:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1e6)
        self.batches += 1


class HugeRate(L.Callback):
    """Ten steps have a hundredfold learning rate."""

    batches = 0
    before: list[float] | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if AT <= self.batches < AT + 10:
            self.before = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= 100
        self.batches += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.before is not None:
            for group, rate in zip(trainer.optimizers[0].param_groups, self.before, strict=True):
                group["lr"] = rate
            self.before = None


class InfiniteRow(L.Callback):
    """A row of the table that is read becomes infinite."""

    row = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.watch.watchers.append(self._look)

    def _look(self, traces: Any, batch: Any) -> None:
        ids = next(iter(traces.values()))["slot_ids"].flatten()
        self.row = int(ids.mode().values)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT:
            table = pl_module.model.value_tables[0]
            with torch.no_grad():
                table.weight[self.row % len(table.weight)] = float("inf")


def watching(path: Path, **changes: Any) -> Instability:
    """The callback with short windows."""
    usual: dict[str, Any] = {
        "window": 40, "warm_up": 20, "threshold": 10.0, "policies": {}, "limits": {}, "restore": "memory",
        "keep_every_n_steps": 20, "settle_steps": 5, "max_tries": 12, "lr_factor": 1.0,
    }  # fmt: skip
    return Instability(path=str(path / "events.jsonl"), **{**usual, **changes})


def everything(policy: str) -> dict[str, str]:
    """One policy for all events of a step."""
    return dict.fromkeys(("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike"), policy)


def train(
    path: Path,
    *callbacks: L.Callback,
    overrides: tuple[str, ...] = ("strategy=single",),
    steps: int = STEPS,
    extra: int = 40,
    **options: Any,
) -> tuple[LanguageModule, Losses, L.Trainer]:
    """Trains with the callbacks, with more data than steps, since some are left out."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    given = jobs.settings("ffn=memory_plus", *overrides, steps=steps)
    given["trainer"]["devices"] = world
    torch.manual_seed(3)
    data = [jobs.share(rows(), world, rank) for _ in range(steps + extra)]
    losses = Losses()
    checkpoints = [StepCheckpoint(dirpath=str(path / "checkpoints"), every_n_steps=30)]
    trainer = make_trainer(given, callbacks=[*callbacks, losses, *checkpoints], loggers=[])
    module = LanguageModule(given)
    trainer.fit(module, loader(data), **options)
    return module, losses, trainer


@torch.no_grad()
def loss_on_other_rows(module: LanguageModule) -> float:
    """Of rows that no training has seen, always the same."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(9)
    batch = rows(400)
    torch.set_rng_state(generator_state)
    module.eval()
    nll_M = token_nll(module.model, module(batch).hidden_BTD, batch["labels"])
    return float(nll_M.mean())


def spread(overrides: list[str], path: str, restore: str) -> dict[str, Any]:
    """One gradient on one rank is not finite, and all ranks go back; the losses afterwards, and the steps counted."""
    here = Path(path)
    watch = watching(here, policies=everything("rollback"), restore=restore, keep_every_n_steps=10, settle_steps=0)
    fault = [OneRank()] if dist.get_rank() == 1 else []
    module, losses, trainer = train(here, *fault, watch, overrides=tuple(overrides), steps=45, extra=20)
    norms = [float(value.norm()) for value in held_weights(module).values()]
    return {"losses": losses.losses, "steps": losses.steps, "final": trainer.global_step, "norms": norms}


class OneRank(L.Callback):
    """In step 38 the loss of this rank is not finite."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.hook = None
        if batch_idx == 37:
            self.hook = pl_module.model.norm.register_forward_hook(lambda *a: a[-1] * float("nan"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.hook is not None:
            self.hook.remove()


def extreme_of_ranks() -> list[float]:
    """What all ranks take for the extremes of theirs, of which the second has no numbers."""
    broken = float("nan") if dist.get_rank() == 1 else 1.0
    values = {
        "a_max": torch.tensor(broken),
        "b_min": torch.tensor(broken),
        "c_max": torch.tensor(1.0 + dist.get_rank()),
    }
    module: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=2), device=torch.device("cpu"))
    return [float(value) for value in diagnostics._over_ranks({0: values}, module)[0].values()]


def stop_one_rank(overrides: list[str], path: str) -> str:
    """The second rank alone is asked to stop, at a step that neither logs nor saves."""
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
