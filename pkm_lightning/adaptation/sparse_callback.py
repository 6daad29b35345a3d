"""The part of `finetune=sparse` that acts while a run is trained: it chooses the rows of each step and reports them.

Metrics at log steps, for each set of tables (`table0`, ...): `train/sparse/table0/chosen_share` (of its rows, those
that learn in the step), `train/sparse/table0/rows_changed` (so far) and `train/sparse/table0/threshold` (the lowest
score of a chosen row).

The model computes as it will be used, in evaluation mode: dropout is off, and running statistics do not move.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from pkm_lightning.adaptation.background import ReadBackground, measure_background
from pkm_lightning.adaptation.background_text import share_of_rank, text_reader, text_sequences
from pkm_lightning.adaptation.row_chooser import RowChooser
from pkm_lightning.adaptation.row_reads import RowReads
from pkm_lightning.adaptation.row_scores import WITH_BACKGROUND, Score
from pkm_lightning.adaptation.saved_background import has_background, named_background, saved_background
from pkm_lightning.build.instantiate import target_class
from pkm_lightning.checkpoints import latest_checkpoint
from pkm_lightning.data.base import data_of, tokenizer_of
from pkm_lightning.errors import ConfigError, DataError, counted
from pkm_lightning.model import Traces
from pkm_lightning.training import LanguageModule

_log = logging.getLogger(__name__)
_info = rank_zero_only(_log.info)


class SparseRows(L.Callback):
    """Chooser of the rows that learn. Its state is the background, the rows changed so far and those of the task.

    The arguments are those of `SparseFinetuning`.
    """

    def __init__(
        self,
        *,
        rows: int | None,
        score: Score,
        per: str,
        task_steps: int | None,
        background: str | None,
        background_path: str | None,
        background_batches: int,
    ) -> None:
        self.rows, self.score, self.per, self.task_steps = rows, score, per, task_steps
        self.background, self.background_path = background, background_path
        self.background_batches = background_batches
        self.chooser: RowChooser | None = None
        self._saved: dict[str, Any] = {}
        self._modes: list[tuple[torch.nn.Module, bool]] = []

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses strategies that own all parameters, and callbacks that change rows, with a ConfigError."""
        strategy = config["strategy"]
        if strategy and getattr(target_class(strategy, "strategy"), "owns_parameters", False):
            raise ConfigError(
                f"strategy._target_={strategy['_target_']}: its engine trains the parameters outside of tables, and "
                "finetune=sparse leaves none of them; set strategy=ddp or strategy=fsdp."
            )
        for name, entry in (config["callbacks"] or {}).items():
            if entry and getattr(target_class(entry, f"callbacks.{name}"), "changes_rows", False):
                raise ConfigError(
                    f"callbacks.{name} changes rows of tables, of which finetune=sparse keeps all but the chosen ones "
                    f"as they are; set ~callbacks.{name}."
                )

    @property
    def _compares(self) -> bool:
        return self.score in WITH_BACKGROUND and self.rows is not None

    def check_background(self, config: Mapping[str, Any], rows: Mapping[str, int]) -> None:
        """Refuses a background that is missing, or of other tables.

        Args:
            config: of a run that is to be trained.
            rows: number of rows of each set of tables.

        Raises:
            PkmError: saying where a background can come from.
        """
        # A run that continues has the background in its checkpoint.
        continues = config.get("resume") != "never" and latest_checkpoint(Path(config["run_dir"])) is not None
        if not self._compares or continues:
            return
        init_from = config.get("init_from")
        if self.background_path is not None:
            text_reader(self.background_path, "finetune.background_path")
        elif self.background is not None:
            background = named_background(self.background, "finetune.background=")
            background.check(rows, f"finetune.background={self.background}")
        elif init_from is not None and has_background(init_from):
            saved_background(init_from).check(rows, f"init_from={init_from}")
        else:
            where = "no init_from=RUN is given" if init_from is None else f"init_from={init_from} holds none"
            raise ConfigError(
                f"finetune.score={self.score} compares reads with those of ordinary text, and {where}: set "
                "finetune.background_path=TEXT to count them in a text before training, "
                "finetune.background=RUN_OR_FILE, or finetune.score=tf, which needs no background."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes or measures the background, and chooses the rows of the task; collective."""
        assert isinstance(pl_module, LanguageModule)
        self._modes = [(module, module.training) for module in pl_module.model.modules()]
        pl_module.model.eval()
        reads = RowReads(pl_module.model, learning=True)
        background = self._background(trainer, pl_module) if self._compares or self._saved else None
        self.chooser = RowChooser(
            reads,
            rows=self.rows,
            score=self.score,
            background=background,
            seed=int(pl_module.config["seed"]),
            device=trainer.strategy.root_device,
        )
        if self._saved:
            self.chooser.load_state_dict(self._saved["chooser"])
            self._saved = {}
        elif self.per == "task":
            self._choose_for_task(trainer, pl_module)
        pl_module.watch.watchers.append(self._watch)

    def _background(self, trainer: L.Trainer, module: LanguageModule) -> ReadBackground | None:
        if self._saved:
            state = self._saved["background"]
            return None if state is None else ReadBackground.from_state(state)
        if self.background_path is not None:
            return self._measured(trainer, module)
        if self.background is not None:
            return named_background(self.background, "finetune.background=")
        background = saved_background(module.config["init_from"])
        _info("read background: %s, counted in the training of init_from", counted(background.n_batches, "sequence"))
        return background

    def _measured(self, trainer: L.Trainer, module: LanguageModule) -> ReadBackground:
        data, path = data_of(trainer), self.background_path
        assert path is not None
        tokenizer = tokenizer_of(data)
        if tokenizer is None:
            raise ConfigError(
                f"finetune.background_path={path}: {type(data).__name__} has no tokenizer to read the text with; count "
                "it with measure_background, and give the file that it saves as finetune.background=FILE."
            )
        reader = text_reader(path, "finetune.background_path")
        sequences = text_sequences(reader, tokenizer, getattr(data, "seq_len", 512), self.background_batches)
        batches = share_of_rank(sequences, trainer.global_rank, trainer.world_size)
        if not batches:
            of = f"of {trainer.world_size} ranks"
            raise DataError(
                f"finetune.background_path={path} holds {counted(len(sequences), 'sequence')}, and each {of} reads one "
                "or more."
            )
        _info("read background: %s of %s", counted(len(sequences), "sequence"), path)

        def forward(ids_BT: Tensor) -> None:
            _forward(trainer, module, {"input_ids": ids_BT})

        return measure_background(module.model, batches, forward=forward)

    @torch.no_grad()
    def _choose_for_task(self, trainer: L.Trainer, module: LanguageModule) -> None:
        assert self.chooser is not None
        for batch in _task_batches(trainer, self.task_steps):
            output = _forward(trainer, module, batch)
            self._watch(output.traces, batch)
        self.chooser.fix()

    def _watch(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        assert self.chooser is not None
        self.chooser.add(self.chooser.reads.of_traces(traces, batch))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Chooses the rows, before the module measures and clips the norm of their gradients; logs figures."""
        if self.chooser is None or trainer.fit_loop._should_accumulate():
            return
        self.chooser.choose(trainer.global_step + 1)
        assert isinstance(pl_module, LanguageModule)
        if pl_module.log_is_due():
            pl_module.log_dict({f"train/sparse/{name}": value for name, value in self.chooser.figures().items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Records the rows of a step that was made."""
        assert isinstance(pl_module, LanguageModule)
        if self.chooser is not None and not trainer.fit_loop._should_accumulate():
            self.chooser.end_step(updated=not pl_module.watch.refused)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports what has changed."""
        if self.chooser is not None:
            for name, changed in self.changed_rows().items():
                _info("%s: changed %s", name, changed)
        self._stop(pl_module)

    def changed_rows(self) -> dict[str, str]:
        """Returns by set of tables which rows have changed so far, in words."""
        report = {} if self.chooser is None else self.chooser.report()
        return {
            name: f"{of_set.rows:,} of {counted(of_set.of_rows, 'row')} ({counted(of_set.n_bytes, 'byte')})"
            for name, of_set in report.items()
        }

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops watching."""
        self._stop(pl_module)

    def _stop(self, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModule)
        if self._watch in pl_module.watch.watchers:
            pl_module.watch.watchers.remove(self._watch)
        if self.chooser is not None:
            self.chooser.lift()
        for module, training in self._modes:
            module.training = training
        self._modes = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the background, the rows changed so far, and those of the task."""
        if self.chooser is None:
            return self._saved
        background = self.chooser.background
        return {
            "background": None if background is None else background.state_dict(),
            "chooser": self.chooser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until training starts: the model may not be built yet."""
        self._saved = state


def _forward(trainer: L.Trainer, module: LanguageModule, batch: dict[str, Tensor]) -> Any:
    """Returns the output of a forward in the precision of the training, with traces."""
    on_device = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    with trainer.precision_plugin.forward_context():
        return module.forward(on_device, observe=True)


def _task_batches(trainer: L.Trainer, steps: int | None) -> Iterator[dict[str, Tensor]]:
    """Returns this rank's micro-batches of the first `steps` optimizer steps; None: of an epoch, or of the training."""
    data: Any = data_of(trainer)
    if steps is None:
        passes = getattr(data, "passes", None)
        # Data of a user's own may not know how long an epoch is; their loader ends with it.
        steps = (
            trainer.max_steps if passes is None else math.ceil(trainer.max_steps / max(1.0, passes(trainer.max_steps)))
        )
    _info("the rows of the task are chosen by the reads of %s", counted(steps, "step"))
    yield from islice(data.train_dataloader(), steps * trainer.accumulate_grad_batches)
