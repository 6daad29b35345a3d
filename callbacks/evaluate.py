"""Public benchmarks while a model trains: tasks of lm-evaluation-harness on a sample of their questions.

Metrics, in the loggers and in metrics.csv: `eval/TASK_METRIC`, such as `eval/piqa_acc`; after the filter of the answers
where a task has several. Ranks share the questions. Training is the same bit for bit with and without it, and the time
that it takes is none of training.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L

from pkm_lightning.build.loading import context_of
from pkm_lightning.callbacks.base import evaluation_mode, in_training
from pkm_lightning.callbacks.stopwatch import TimedCallback
from pkm_lightning.data.base import tokenizer_of
from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.inference.harness_settings import read_settings
from pkm_lightning.training import LanguageModule

__all__ = ["Evaluate"]

_KEY = "callbacks.evaluate"
_log = logging.getLogger(__name__)


class Evaluate(L.Callback):
    """Scorer of benchmarks, every n steps or at each validation of training.

    Args:
        tasks: names of tasks, groups or tags of the harness or of `tasks_dir`.
        tasks_dir: folder of the user's own tasks; None for the harness's alone.
        every_n_steps: optimizer steps between evaluations, a multiple of trainer.log_every_n_steps; None for each
            validation.
        limit: questions per task; None for all.
        num_fewshot: solved examples before each question; None for each task's own number.
        batch_size: largest number of sequences per forward.

    Attributes:
        metrics: of the last evaluation, by the names above.
        step: at which that was; None before the first.

    Raises:
        ConfigError: no task, a number out of range, or lm_eval is not installed.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        tasks_dir: str | None,
        every_n_steps: int | None,
        limit: int | None,
        num_fewshot: int | None,
        batch_size: int,
    ) -> None:
        if every_n_steps is not None:
            check_integer(f"{_KEY}.every_n_steps", every_n_steps, low=1)
        self.every_n_steps = every_n_steps
        self._settings = read_settings(
            tasks=tasks,
            tasks_dir=tasks_dir,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            prefix=f"{_KEY}.",
        )
        self.metrics: dict[str, float] = {}
        self.step: int | None = None
        self._tasks: dict[str, Any] = {}

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses an interval at which nothing is logged, with a ConfigError."""
        log_every = config["trainer"]["log_every_n_steps"]
        if self.every_n_steps is not None and log_every and self.every_n_steps % log_every:
            raise ConfigError(
                f"{_KEY}.every_n_steps={self.every_n_steps} is not a multiple of trainer.log_every_n_steps={log_every}"
                f", the steps at which anything is logged; set {_KEY}.every_n_steps to a multiple of it, or to null."
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Loads the tasks and their data, before training starts.

        Raises:
            ConfigError: an unknown task, or data without a tokenizer.
            DataError: the data of a task are missing or cannot be had.
        """
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if tokenizer_of(data) is None:
            raise ConfigError(f"{_KEY} needs a tokenizer, and {type(data).__name__} has none; remove it with ~{_KEY}.")
        # An extra, which takes a second to import.
        from pkm_lightning.inference.harness_tasks import load_tasks

        settings = self._settings
        self._tasks = load_tasks(settings.tasks, tasks_dir=settings.tasks_dir, num_fewshot=settings.num_fewshot)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates, if no interval of steps is set."""
        if self.every_n_steps is None and in_training(trainer):
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Evaluates after a step that ends an interval."""
        assert isinstance(pl_module, LanguageModule)
        if self.every_n_steps is None or not pl_module.log_is_due() or trainer.global_step % self.every_n_steps:
            return
        with evaluation_mode(pl_module), _stopped_clocks(trainer):
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from pkm_lightning.inference.harness import HarnessModel
        from pkm_lightning.inference.harness_results import run_tasks, scores_of

        assert isinstance(pl_module, LanguageModule)
        model = HarnessModel(
            pl_module.model,
            trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
            context=context_of(pl_module.config),
            device=pl_module.device,
            batch_size=self._settings.batch_size,
            progress=False,
        )
        with trainer.precision_plugin.forward_context():
            results = run_tasks(model, self._tasks, limit=self._settings.limit, bootstraps=0, progress=False)
        self.metrics = {f"eval/{score.task}_{score.metric}": score.value for score in scores_of(results)}
        self.step = trainer.global_step
        # Not by `pl_module.log`: Lightning 2.6 would repeat the figures at every later step that logs.
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=self.step)
        if trainer.is_global_zero:
            shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in self.metrics.items())
            _log.info("benchmarks at step %d: %s", self.step, shown)


@contextlib.contextmanager
def _stopped_clocks(trainer: L.Trainer) -> Iterator[None]:
    """Stops the clocks of training, as a validation does by itself."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [callback.stopwatch for callback in callbacks if isinstance(callback, TimedCallback)]
    for clock in clocks:
        clock.stop()
    try:
        yield
    finally:
        for clock in clocks:
            clock.start()
