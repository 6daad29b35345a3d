"""Notices when training becomes unstable, and does what a policy asks for. Every event is a line of events.jsonl.

| event | is | may be answered by |
|---|---|---|
| loss_not_finite | the mean loss of a step | warn, skip, rollback, stop |
| gradient_not_finite | a gradient norm of a step, of the tables or of the rest | warn, skip, rollback, stop |
| loss_spike | a loss far above those of the last `window` steps | warn, skip, rollback, stop |
| gradient_spike | a gradient norm far above those of the window | warn, skip, rollback, stop |
| weight_not_finite | a parameter, at log steps and before a checkpoint | warn, rollback, stop |
| limit | a figure of `callbacks.diagnostics` above its entry in `limits` | warn, rollback, stop |

`warn` writes the event at the next log step; nothing else happens, and no step waits for the device. With any other
policy for one of the first four events, every step reads a few numbers before its update, which waits for the device
and, with several ranks, for the first rank. `skip` refuses the step: weights, optimizers, staged rows, the statistics
of plugins and the schedule stay as they were; the step counts in `max_steps`, and its tokens count as seen. `rollback`
refuses the step too and returns to the last good state, from which training continues with the data that come next: the
remedy of PaLM (arXiv 2204.02311, section 5.1), within the run. `stop` ends the run with an error. The strongest answer
of a step counts. Weights that are not finite are never saved, unless the policy of `weight_not_finite` is `warn`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.callbacks.base import find_callback
from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.event_log import Event, EventLog
from pkm_lightning.callbacks.event_policies import POLICIES, STEP_EVENTS, Retries, StepEvents, policies_by_event
from pkm_lightning.callbacks.good_states import GoodStates, newest_in_words, will_save
from pkm_lightning.callbacks.instability_checks import KEY, check_config, check_limits, check_numbers, check_states
from pkm_lightning.callbacks.model_events import limit_events, weight_events
from pkm_lightning.errors import InstabilityError
from pkm_lightning.training import LanguageModule

__all__ = ["Instability"]

_log = logging.getLogger(__name__)


class Instability(L.Callback):
    """A watch over every step.

    Args:
        path: the file of events.
        window: steps that a loss or gradient norm is compared with, 10 or more.
        warm_up: steps before the first spike can be detected.
        threshold: robust z-score above which a step is a spike; see `SpikeWindow`.
        policies: a policy per event of the table above; events left out get `warn`. `weight_not_finite`, left out or
            None, follows `loss_not_finite`: rollback for its rollback, stop for its stop or skip.
        limits: the largest values of figures of `callbacks.diagnostics`, by name; None: no limits.
        restore, keep_every_n_steps, settle_steps: as of `GoodStates`.
        max_tries: refused steps in a row, or rollbacks without getting beyond the step that failed; then the run ends.
        lr_factor: factor of the learning rate at each rollback.
    """

    #: Behind every callback that acts on a step which a rollback may abandon.
    hook_order = 2

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
        check_states(restore, keep_every_n_steps, settle_steps)
        check_numbers(window, warm_up, threshold, max_tries, lr_factor)
        self.policies, self.limits = policies_by_event(policies), check_limits(limits)
        self._window: dict[str, Any] = {"window": window, "warm_up": warm_up, "threshold": threshold}
        self.restore, self.lr_factor = restore, lr_factor
        self.events = EventLog(Path(path))
        rolls_back = "rollback" in self.policies.values()
        self.good = GoodStates(restore, keep_every_n_steps, settle_steps) if rolls_back else None
        self._waits = any(self.policies[event] != "warn" for event in STEP_EVENTS)
        self._steps: StepEvents | None = None
        self._saved: dict[str, Any] = {}
        self._answer: str | None = None
        self._reason = ""
        self._retries = Retries(max_tries)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses policies that cannot be carried out; see `check_config`."""
        check_config(config, policies=self.policies, restore=self.restore, limits=self.limits)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to watch."""
        assert isinstance(pl_module, LanguageModule)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._steps = StepEvents(**self._window, scaled_gradients=scaled, device=pl_module.device)
        if self._saved:
            self._steps.spikes.load_state_dict(self._saved["spikes"])
            self._retries.load_state_dict(self._saved["tries"])
            self.events.lines = self._saved["lines"]
        if trainer.is_global_zero:
            self.events.begin()
        self._module = pl_module
        pl_module.watch.judges.append(self._judge)
        if self.good is not None:
            self.good.begin(trainer, pl_module)

    def _judge(self, figures: dict[str, Tensor]) -> bool:
        """Returns whether the update may be made; without a policy that can refuse it, only notes the figures."""
        assert self._steps is not None
        events = self._steps.add(self._module.trainer.global_step + 1, figures, wait=self._waits)
        return not any(self.policies[event.name] != "warn" for event in events)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Writes the events of the step when a log is due, or at once where a policy asks for it; then answers them."""
        assert isinstance(pl_module, LanguageModule)
        if trainer.fit_loop._should_accumulate():
            return
        due, step = pl_module.log_is_due(), trainer.global_step
        if due or self._waits:
            self._note_steps(trainer)
        keeps = self.good is not None and self.good.is_due(trainer)
        if self._answer is None and (due or keeps or step == trainer.max_steps or will_save(trainer)):
            for event in weight_events(pl_module, step):
                self._note(trainer, event)
        if due:
            for event in limit_events(find_callback(trainer, Diagnostics), self.limits, step):
                self._note(trainer, event)
        answer, self._answer = self._answer, None
        # A skipped step has been refused before its update; here it only counts as a retry.
        if answer not in (None, "warn"):
            self._act(str(answer), trainer, pl_module)
            return
        self._retries.register_success(step)
        if answer is None and keeps and self.good is not None:
            self.good.keep(trainer, pl_module)

    def _note_steps(self, trainer: L.Trainer, *, collective: bool = True) -> None:
        for event in [] if self._steps is None else self._steps.drain():
            self._note(trainer, event, collective=collective)

    def _note(self, trainer: L.Trainer, event: Event, *, collective: bool = True) -> None:
        action = self.policies[event.name]
        if self._answer is None or POLICIES.index(action) > POLICIES.index(self._answer):
            self._answer, self._reason = action, str(event)
        more: dict[str, Any] = {}
        if action == "rollback" and self.good is not None and collective:
            more["returned_to"] = self.good.newest(trainer)
        if trainer.is_global_zero:
            self.events.write(event, action, **more)

    def _act(self, answer: str, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        if answer == "stop":
            raise InstabilityError(f"{self._reason}; its policy in {KEY}.policies is stop; {newest_in_words(trainer)}.")
        if not self._retries.allow(answer, trainer.global_step):
            raise InstabilityError(
                f"{self._reason}; {self._retries.limit} times {answer} did not get beyond it: lower optim.lr, lengthen "
                f"optim.warmup_share, or look at the data; {newest_in_words(trainer)}."
            )
        if answer == "rollback" and self.good is not None:
            self.good.go_back(trainer, pl_module, self.lr_factor)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to replace a good checkpoint by weights that are not finite, unless their policy is `warn`."""
        if self.policies["weight_not_finite"] != "warn" and isinstance(pl_module, LanguageModule):
            for event in weight_events(pl_module, trainer.global_step):
                what = f"{event.layer} is not finite in step {event.step}, so it is not saved"
                raise InstabilityError(f"{what}; {newest_in_words(trainer)}.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last events, and frees the states."""
        assert isinstance(pl_module, LanguageModule)
        pl_module.watch.judges = [judge for judge in pl_module.watch.judges if judge != self._judge]
        try:
            # After an error the other ranks may not be there, so nothing collective is called.
            self._note_steps(trainer, collective=False)
        except RuntimeError as error:  # such as a failed device: the error that was raised first must be reported
            _log.warning("%s lacks the last steps: %s", self.events.path, error)
        if self.good is not None:
            self.good.forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends in the same way."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, the retries and the number of lines written."""
        spikes = self._saved.get("spikes", {}) if self._steps is None else self._steps.spikes.state_dict()
        return {"spikes": spikes, "tries": self._retries.state_dict(), "lines": self.events.lines_on_disk()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._saved = state
