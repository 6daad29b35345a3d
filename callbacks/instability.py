"""Notices when training goes wrong, and does what a policy says. Every event is a line of events.jsonl.

| event | is | may be answered by |
|---|---|---|
| loss_not_finite | the mean loss of a step | warn, skip, rollback, stop |
| gradient_not_finite | a gradient norm of a step, of tables or of the rest | warn, skip, rollback, stop |
| loss_spike | a loss far above those of the last `window` steps | warn, skip, rollback, stop |
| gradient_spike | a gradient norm far above those of the window | warn, skip, rollback, stop |
| weight_not_finite | a parameter, at log steps and before a checkpoint | warn, rollback, stop |
| limit | a figure of `callbacks.diagnostics` above its `limits` | warn, rollback, stop |

`warn` writes the event at the next log step; nothing else happens, and no step waits for the device. With any other
policy for one of the first four, every step waits for a handful of numbers before it is made, of several ranks also for
each other. `skip` refuses the step: weights, optimizers, staged rows, plugins' statistics and the schedule stay as they
were, the step counts in `max_steps`, its tokens as seen. `rollback` does so too and goes back to the last good state,
after which training goes on with the data that come next: the remedy of PaLM (arXiv 2204.02311, section
5.1), within the run. `stop` ends the run with an error. Of several events in a step the strongest answer counts. With
any answer but `warn` to `weight_not_finite` no checkpoint is written of weights that are not finite.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.event_log import Event, EventLog
from pkm_lightning.callbacks.good_states import GoodStates
from pkm_lightning.callbacks.policies import POLICIES, Tries, all_policies, check_mapping
from pkm_lightning.callbacks.spikes import SpikeWindow
from pkm_lightning.callbacks.step_checkpoint import StepCheckpoint
from pkm_lightning.callbacks.step_events import FLOORS, RELATIVE_FLOORS, STEP_EVENTS, StepEvents
from pkm_lightning.callbacks.stopwatch import step_logs
from pkm_lightning.errors import ConfigError, InstabilityError, check_choice, check_integer, check_range
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import held_weights, largest_values

_log = logging.getLogger(__name__)
#: Fewer steps have no spread to speak of.
_LEAST_WINDOW = 10
_SHOW_EVERY = 100


class Instability(L.Callback):
    """Watches every step.

    Args:
        path: the file of events.
        window: steps that a loss or gradient norm is compared with, 10 or more.
        warm_up: steps before the first spike can be told.
        threshold: robust z-score from which on a step is a spike; see `SpikeWindow`.
        policies: a policy for each event of the table above; events left out are warned of. `weight_not_finite`, left
            out or None, goes with `loss_not_finite`: rollback as that, stop for its stop or skip.
        limits: highest values of `callbacks.diagnostics`, by name; None: none.
        restore: where rollback finds a state: `memory` (a copy in host memory, of two states, each as large as a
            checkpoint) or `disk` (the last checkpoint).
        keep_every_n_steps: steps between states in memory.
        settle_steps: a state in memory counts as good after as many further steps, at most `keep_every_n_steps`: what
            spoils the weights may take some steps to show.
        max_tries: refused steps in a row, or rollbacks without getting beyond the step that failed; then the run ends.
        lr_factor: the learning rate is multiplied by it at each rollback.
    """

    order = 2  # last: it may go back to an earlier step, after the others have seen this one

    def __init__(
        self,
        *,
        path: str,
        window: int,
        warm_up: int,
        threshold: float,
        policies: Mapping[str, str | None],
        limits: Mapping[str, float] | None,
        restore: str,
        keep_every_n_steps: int,
        settle_steps: int,
        max_tries: int,
        lr_factor: float,
    ) -> None:
        key = "callbacks.instability"
        for name, number in (("keep_every_n_steps", keep_every_n_steps), ("max_tries", max_tries)):
            check_integer(f"{key}.{name}", number, low=1)
        check_integer(f"{key}.window", window, low=_LEAST_WINDOW)
        check_integer(f"{key}.warm_up", warm_up, low=1, high=window)
        check_integer(f"{key}.settle_steps", settle_steps, low=0, high=keep_every_n_steps)
        check_range(f"{key}.threshold", threshold, 0)
        check_range(f"{key}.lr_factor", lr_factor, 1e-9, 1)
        check_choice(f"{key}.restore", restore, ("memory", "disk"))
        self.policies = all_policies(policies)
        check_mapping("limits", limits or {})
        limits = dict(limits or {})
        for name, limit in limits.items():
            check_range(f"{key}.limits.{name}", limit)
        self.window, self.warm_up, self.threshold, self.limits = window, warm_up, threshold, limits
        self.lr_factor = lr_factor
        self.events = EventLog(Path(path))
        rolls_back = "rollback" in self.policies.values()
        self.good = GoodStates(restore, keep_every_n_steps, settle_steps) if rolls_back else None
        self._waits = any(self.policies[event] != "warn" for event in STEP_EVENTS)
        self._steps: StepEvents | None = None
        self._saved: dict[str, Any] = {}
        self._answer: str | None = None
        self._tries = Tries(max_tries)
        self._reason = ""
        self._shown: dict[str, int] = {}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses what cannot work with the rest of a configuration, before anything starts.

        Raises:
            ConfigError: steps to refuse whose update is made in backward; states in memory that an engine holds.
        """
        chosen = {event: self.policies[event] for event in STEP_EVENTS}
        late = [f"{event}={policy}" for event, policy in chosen.items() if policy in ("skip", "rollback")]
        if late and config["table"].get("learning") == "fused":
            raise ConfigError(
                f"callbacks.instability.policies.{late[0]} comes too late with table.learning=fused, which has updated "
                "the table in backward already; set table.learning=rows, or the policy warn or stop."
            )
        strategy = str((config["strategy"] or {}).get("_target_", ""))
        if self.good is not None and self.good.restore == "memory" and strategy.endswith("DeepSpeed"):
            raise ConfigError(
                "callbacks.instability.restore=memory cannot copy what DeepSpeed's engine holds; say "
                "callbacks.instability.restore=disk."
            )
        callbacks = config["callbacks"] or {}
        if self.good is not None and self.good.restore == "disk" and not callbacks.get("step_checkpoint"):
            raise ConfigError(
                "callbacks.instability.restore=disk needs callbacks.step_checkpoint, which is off; turn it on, or say "
                "callbacks.instability.restore=memory."
            )
        if self.limits and not (callbacks.get("diagnostics") or callbacks.get("vitals")):
            _log.warning("callbacks.instability.limits are not watched, since callbacks.diagnostics is off")

    # --- the life of a run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to watch."""
        assert isinstance(pl_module, LanguageModule)
        spikes = SpikeWindow(
            floors=FLOORS,
            relative_floors=RELATIVE_FLOORS,
            window=self.window,
            warm_up=self.warm_up,
            device=pl_module.device,
        )
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._steps = StepEvents(spikes, self.threshold, scaled_gradients=scaled)
        if self._saved:
            spikes.load_state_dict(self._saved["spikes"])
            self._tries.load_state_dict(self._saved["tries"])
            self.events.lines = self._saved["lines"]
        if trainer.is_global_zero:
            self.events.begin()
        self._module = pl_module
        pl_module.watch.judges.append(self._judge)
        if self.good is not None:
            self.good.begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """After a step: what was found is written when a log is due, and answered at once where the policy says so."""
        assert isinstance(pl_module, LanguageModule)
        if trainer.fit_loop._should_accumulate():
            return
        due = step_logs(trainer)
        if due or self._waits:
            self._write_steps(trainer)
        keeps = self.good is not None and self.good.is_due(trainer)
        last = trainer.global_step == trainer.max_steps
        if self._answer is None and (due or keeps or last or _saves(trainer)):
            self._check_weights(trainer, pl_module)
        if due:
            self._check_limits(trainer)
        answer, self._answer = self._answer, None
        if answer not in (None, "warn"):
            self._act(str(answer), trainer, pl_module)
            return
        self._tries.made(trainer.global_step)
        if answer is None and keeps and self.good is not None:
            self.good.keep(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Weights that are not finite replace no good checkpoint, unless that is only to be warned of."""
        if self.policies["weight_not_finite"] != "warn" and isinstance(pl_module, LanguageModule):
            broken = _broken_weight(pl_module)
            if broken is not None:
                raise InstabilityError(
                    f"{broken[0]} is not finite in step {trainer.global_step}, so it is not saved; {_left(trainer)}."
                )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what is left, and lets go of module and states."""
        self._end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Likewise; without a word to other ranks, which may not be there."""
        self._end(trainer, pl_module)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        pl_module.watch.judges = [judge for judge in pl_module.watch.judges if judge != self._judge]
        try:
            self._write_steps(trainer, alone=True)
        except RuntimeError as error:  # a device that has failed, say: what was raised first is to be told
            _log.warning("%s lacks the last steps: %s", self.events.path, error)
        if self.good is not None:
            self.good.forget()

    def state_dict(self) -> dict[str, Any]:
        """Window, tries and lines so far."""
        spikes = self._saved.get("spikes", {}) if self._steps is None else self._steps.spikes.state_dict()
        return {"spikes": spikes, "tries": self._tries.state_dict(), "lines": self.events.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Taken up when training starts."""
        self._saved = state

    # --- what is found

    def _judge(self, figures: dict[str, Tensor]) -> bool:
        """Before an update: notes its figures; where a policy may refuse it, decides."""
        assert self._steps is not None
        trainer = self._module.trainer
        found = self._steps.take(trainer.global_step + 1, figures, wait=self._waits)
        return not any(self.policies[event.name] != "warn" for event in found)

    def _write_steps(self, trainer: L.Trainer, *, alone: bool = False) -> None:
        for event in [] if self._steps is None else self._steps.drain():
            self._note(trainer, event, alone=alone)

    def _check_weights(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        broken = _broken_weight(pl_module)
        if broken is not None:
            self._note(trainer, Event("weight_not_finite", trainer.global_step, broken[1], layer=broken[0]))

    def _check_limits(self, trainer: L.Trainer) -> None:
        diagnostics = next((c for c in trainer.callbacks if isinstance(c, Diagnostics)), None)  # type: ignore[attr-defined]
        if diagnostics is None or diagnostics.step != trainer.global_step:
            return
        known = {name for values in diagnostics.found.values() for name in values}
        for name, limit in self.limits.items():
            check_choice("callbacks.instability.limits: figure", name, sorted(known))
            for layer, values in diagnostics.found.items():
                value = float(values[name]) if name in values else limit
                if not value <= limit:
                    self._note(trainer, Event("limit", trainer.global_step, value, name, layer, limit))

    def _note(self, trainer: L.Trainer, event: Event, *, alone: bool = False) -> None:
        """Writes an event; every rank must come here, but at the end, when one may be `alone`."""
        action = self.policies[event.name]
        if self._answer is None or POLICIES.index(action) > POLICIES.index(self._answer):
            self._answer, self._reason = action, str(event)
        more: dict[str, Any] = {}
        if action == "rollback" and self.good is not None and not alone:
            more["returned_to"] = self.good.newest(trainer)
        if not trainer.is_global_zero:
            return
        self.events.write(event, action, **more)
        # A run that stays broken would fill the screen.
        if action != "warn" or event.step - self._shown.get(event.name, -_SHOW_EVERY) >= _SHOW_EVERY:
            self._shown[event.name] = event.step
            _log.warning("%s: %s", event, action)

    # --- what is done

    def _act(self, answer: str, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        if answer == "stop":
            raise InstabilityError(f"{self._reason}; callbacks.instability says stop; {_left(trainer)}.")
        if not self._tries.allow(answer, trainer.global_step):
            raise InstabilityError(
                f"{self._reason}; {self._tries.most} times {answer} did not get beyond it: lower optim.lr, lengthen "
                f"optim.warmup_share, or look at the data; {_left(trainer)}."
            )
        if answer == "rollback":
            assert self.good is not None
            self.good.go_back(trainer, pl_module, self.lr_factor)


def _left(trainer: L.Trainer) -> str:
    """What the run can be continued from, on this rank's knowledge."""
    kept = next((c for c in trainer.callbacks if isinstance(c, StepCheckpoint)), None)  # type: ignore[attr-defined]
    names = [] if kept is None else sorted(path.name for path in Path(str(kept.dirpath)).glob("step-*.ckpt"))
    return f"its last checkpoint is {names[-1]}" if names else "there is no checkpoint yet"


def _saves(trainer: L.Trainer) -> bool:
    """A checkpoint of this step will follow, as all ranks know."""
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(callback.is_due(trainer) for callback in found if isinstance(callback, StepCheckpoint))


def _broken_weight(pl_module: LanguageModule) -> tuple[str, float] | None:
    """Name and largest absolute value of the first parameter that is not finite; all ranks must ask and agree."""
    named = held_weights(pl_module)
    values = largest_values(list(named.values()))
    if pl_module.trainer.world_size > 1:
        # A maximum need not keep what is no number.
        values = torch.where(values.isfinite(), torch.zeros_like(values), torch.full_like(values, float("inf")))
        values = values.to(pl_module.device)
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return next(((name, v) for name, v in zip(named, values.tolist(), strict=True) if not math.isfinite(v)), None)
