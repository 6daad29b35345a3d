"""The LightningModule around the transformer: micro-batches, the optimizer step, held-out loss, checkpoints.

It is built from a plain configuration dict, which every checkpoint holds. A step is normalised in
`on_before_optimizer_step`, clipped in `configure_gradient_clipping`, and made or refused in `optimizer_step`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from pkm_lightning.build.checks import check_clipping
from pkm_lightning.build.distribution import check_own_tables, table_mesh
from pkm_lightning.build.freezing import is_frozen
from pkm_lightning.build.model import attention_context, bind_tokenizer, build_model, load_pretrained
from pkm_lightning.build.schedule import configured_schedule
from pkm_lightning.checkpoints.tokenizer_check import check_tokenizer
from pkm_lightning.data.base import data_of, fingerprint_of, tokenizer_digest, tokenizer_of
from pkm_lightning.ffn import HasAfterStep
from pkm_lightning.inference.prediction import Answering, answer_batch
from pkm_lightning.memory import TableMesh, ValueTable, clip_tables
from pkm_lightning.memory.replicas import mean_over_replicas
from pkm_lightning.model import ModelCost, ModelOutput, Transformer, model_cost
from pkm_lightning.model.initialisation import seed_torch
from pkm_lightning.model.loss import token_nll
from pkm_lightning.model.plugin_outputs import plugin_entries
from pkm_lightning.model.sharding import shard_dense
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.ops.ranks import local_shard
from pkm_lightning.training.batch_checks import BatchChecks, log_missing_parts
from pkm_lightning.training.clipping import clip_by_norm, norm_limit
from pkm_lightning.training.engine import engine_of
from pkm_lightning.training.even_batches import check_last, check_lengths
from pkm_lightning.training.heldout import HeldoutSum
from pkm_lightning.training.logged_step import logs_at
from pkm_lightning.training.preparation import prepare
from pkm_lightning.training.step import StepNormaliser, StepRefused, StepReports, StepWatch, drop_gradients
from pkm_lightning.training.table_learning import table_only_optimizer, trainer_optimizer


class LanguageModule(L.LightningModule):
    """LightningModule that trains, validates and queries the transformer that `config` describes.

    Args:
        config: the resolved configuration as plain dicts, lists and numbers; `model.vocab_size` is a number.
        weights_follow: a checkpoint is about to give the weights, so that those of a pretrained model are not read.
        gained: names of the variants that this checkpoint lacks; their outputs start at zero.

    Attributes:
        model: the transformer, after `configure_model`.
        cost: its analytic cost with `data.seq_len` tokens in attention (1 if the data has no such key).
        table_optimizer: optimizer of the tables, where the strategy's engine steps all other parameters; else None.
        tokens_seen: real input tokens trained on so far, over all ranks, a scalar tensor.
        watch: watchers of what plugins read, and judges of steps before they are made.
        answering: how `predict_step` answers prompts; greedily, unless it is replaced.

    Example: `examples/train_from_python.py`.
    """

    model: Transformer
    cost: ModelCost

    def __init__(self, config: dict[str, Any], *, weights_follow: bool = False, gained: Collection[str] = ()) -> None:
        super().__init__()
        self.save_hyperparameters("config", logger=False)  # loggers get few of them
        self.config = config
        self._weights_follow, self._gained = weights_follow, tuple(gained)
        self.heldout_nll, self.heldout_targets = HeldoutSum(), HeldoutSum()
        self.tokens_seen = torch.zeros((), dtype=torch.int64)
        self._normaliser = StepNormaliser()
        self._step_nll: Tensor | None = None
        self._step = 0
        self._reports, self._batches = StepReports(), BatchChecks()
        self.watch = StepWatch()
        self.answering = Answering()
        self.table_optimizer: Optimizer | None = None

    def configure_model(self) -> None:
        """Builds and initialises the model once; Lightning calls this before every fit, validate, test and predict."""
        prepare(self._trainer)
        if hasattr(self, "model"):
            return
        self.model = build_model(self.config, self._table_mesh())
        self.model.init_weights(int(self.config["seed"]), replaced=self._weights_follow)
        if not self._weights_follow or self._gained:
            load_pretrained(self.model, self.config, self._gained)
            # Without a Trainer there are no data that could have a tokenizer.
            if self._trainer is not None:
                bind_tokenizer(self.model, tokenizer_of(data_of(self._trainer)), self.config)
        self.cost = model_cost(self.model, attention_context(self.config))
        if self.config["model"]["compile"]:
            self.model.compile_blocks()
        self._assign_parameters()

    def _table_mesh(self) -> TableMesh | None:
        """Returns the ranks over which tables are split or copied; None in one process."""
        if self._trainer is None or self._trainer.world_size == 1 or not torch.distributed.is_initialized():
            return None
        return table_mesh(self.config["table"], self._trainer)

    def _assign_parameters(self) -> None:
        """Hands the dense parameters to the strategy and keeps the tables out of its reach.

        Tables are sharded or replicated by their own mesh: a strategy that took them for dense parameters would average
        gradients of different rows (DDP), shard the shards (FSDP2) or gather the whole table (ZeRO-3).
        """
        if self._trainer is None:
            return
        # Not `value_tables`: a table that a plugin has made itself is a dense parameter to the strategy.
        tables: list[ValueTable] = list(self.model.tables)  # type: ignore[arg-type]
        has_engine = engine_of(self._trainer) is not None
        for table in tables:
            # Lightning 2.6 draws a whole model anew under FSDP2 if one of its parameters is on meta.
            if has_engine or table.is_streamed:
                table.unregister()
        weights = [weight for table in tables for weight in table.parameters()]
        if has_engine:
            check_own_tables(self.model, engine=True)
        elif self.device_mesh is not None:
            check_own_tables(self.model, engine=False)
            shard_dense(self.model, self.device_mesh["data_parallel"], weights)
        else:
            # DDP would broadcast rank 0's shard to all ranks, and average gradients of different shards.
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            self._ddp_params_and_buffers_to_ignore = [names[id(weight)] for weight in weights]

    def configure_optimizers(self) -> Any:
        """Builds `optim.optimizer` over the groups by role, and the schedule over `trainer.max_steps`."""
        optim = self.config["optim"]
        self.table_optimizer = table_only_optimizer(self.model, self.config)
        optimizer = trainer_optimizer(self.model, self.config, with_rows=self.table_optimizer is None)
        factor = configured_schedule(optim, int(self.config["trainer"]["max_steps"]))
        schedule = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def forward(self, batch: dict[str, Tensor], *, observe: bool = False) -> ModelOutput:
        """Runs the model on a batch of the contract: `input_ids`, optional `doc_ids` and `valid`."""
        output: ModelOutput = self.model(
            batch["input_ids"], doc_ids_BT=batch.get("doc_ids"), valid_BT=batch.get("valid"), observe=observe
        )
        return output

    def on_train_start(self) -> None:
        """Logs what the data lack; raises DataError if the ranks have different numbers of training batches."""
        log_missing_parts(self.trainer)
        needed = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        check_lengths(self.trainer, "train_dataloader", self.trainer.num_training_batches, needed)

    def on_train_epoch_end(self) -> None:
        """Raises DataError if this rank had no batch in the epoch and other ranks had some."""
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            check_last(self.trainer, ended=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds every random draw of the micro-batch by (seed, step, micro-batch, rank), so that resume is exact."""
        # `global_step` is incremented within the batch, refused steps included.
        self._step = self.global_step + 1
        check_last(self.trainer)
        if self.table_optimizer is not None:
            self._follow_schedule(self.table_optimizer)
        stream = f"{self.config['seed']}/{self.global_step}/{batch_idx}/{self.global_rank}"
        seed = seed_torch(stream, on_cpu=self.device.type == "cpu")
        random.seed(seed)
        np.random.seed(seed)

    def on_train_batch_end(self, outputs: Any, batch: object, batch_idx: int) -> None:
        """Raises DataError for a batch that is None, which Lightning leaves out with a warning."""
        if batch is None:
            self._batches.check_training(self, batch, batch_idx)

    def _follow_schedule(self, table_optimizer: Optimizer) -> None:
        """Sets this step's rate for tables outside the optimizer that the schedule drives."""
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        for group in table_optimizer.param_groups:
            group["lr"] = rate * self.config["optim"]["table_lr_factor"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the summed loss, scaled so that the gradients of all micro-batches add up to that of the mean.

        Letters: M positions with a target.
        """
        self._batches.check_training(self, batch, batch_idx)
        # Not self(batch): DeepSpeed's hooks on this module already run around this method.
        output = self.forward(batch, observe=self.watch.observes)
        self.watch.notify(output.traces, batch)
        nll_M = token_nll(self.model, output.hidden_BTD, batch["labels"])
        valid_BT = batch.get("valid")
        # Filled on the device: copying a number from the host would synchronise.
        local_targets = nll_M.new_full((), nll_M.numel(), dtype=torch.int64)
        all_tokens = nll_M.new_full((), batch["labels"].numel(), dtype=torch.int64)
        local_tokens = all_tokens if valid_BT is None else valid_BT.sum()
        targets, tokens = sum_over_ranks(torch.stack([local_targets, local_tokens])).unbind()
        self.tokens_seen = self.tokens_seen.to(tokens.device) + tokens
        factor = self._normaliser.scale(
            targets, world_size=self.trainer.world_size, accumulate=self.trainer.accumulate_grad_batches
        )
        if self.trainer.strategy.handles_gradient_accumulation:
            # Lightning divides by the number of micro-batches, and DeepSpeed's engine does so again.
            factor = factor * self.trainer.accumulate_grad_batches
        nll = nll_M.sum()
        self._step_nll = nll.detach() if self._step_nll is None else self._step_nll + nll.detach()
        self._reports.add(output, local_tokens)
        # aux is a mean over this rank's tokens. Times local_tokens / tokens it sums over ranks to the mean over all
        # tokens; times `targets`, which `factor` divides by those of the step, each micro-batch weighs as much as its
        # share of the targets.
        auxiliary = sum(output.aux_losses.values(), start=nll.new_zeros(()))
        return (nll + auxiliary * targets * local_tokens / tokens.clamp(min=1)) * factor

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Corrects the gradients to the mean over all targets of the step; logs the step's loss if a log is due."""
        if self._accumulates():
            return
        self._batches.check_first_step(self, self._normaliser.total())
        for table in self.model.value_tables:
            if table.weight.grad is not None:
                mean_over_replicas(table.weight.grad, table.mesh)
        if (correction := self._normaliser.correction()) is not None:
            self._correct(correction)
        if self.log_is_due() or self.watch.judges:
            assert self._step_nll is not None
            loss = sum_over_ranks(self._step_nll) / self._normaliser.total().clamp(min=1)
            self.watch.figures = {"loss": loss}
        if self.log_is_due():
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            for name, value in self._reports.means().items():
                self.log(f"train/{name}", value)

    def _correct(self, correction: Tensor) -> None:
        """Multiplies every gradient of the step, staged reads included."""
        tables = self.model.value_tables
        for table in tables:
            if table.stage is not None:
                table.stage.scale = table.stage.scale * correction
        engine = engine_of(self.trainer)
        parameters = self.parameters() if engine is None else (table.weight for table in tables)
        if grads := [local_shard(p.grad) for p in parameters if p.grad is not None]:
            torch._foreach_mul_(grads, correction)
        if engine is not None:
            engine.scale_gradients(correction)

    def _accumulates(self) -> bool:
        """Returns whether micro-batches of the step follow, under a strategy that calls the hooks for each of them."""
        return bool(self.trainer.strategy.handles_gradient_accumulation and self.trainer.fit_loop._should_accumulate())

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the tables by `optim.table_clip_norm`, all else by `optim.clip_norm`; then judges the step.

        `trainer.gradient_clip_val`, if set, takes the place of `optim.clip_norm`.
        """
        if gradient_clip_val is not None:
            check_clipping(gradient_clip_algorithm)
        if self._accumulates():
            return
        optim = self.config["optim"]
        dense_limit = norm_limit(optim["clip_norm"] if gradient_clip_val is None else gradient_clip_val)
        table_limit = norm_limit(optim["table_clip_norm"])
        table_groups = [] if self.table_optimizer is None else self.table_optimizer.param_groups
        groups: dict[str, list[torch.nn.Parameter]] = {"dense": [], "table": []}
        for group in [*optimizer.param_groups, *table_groups]:
            groups["table" if group["name"] in ("table", "table_dense") else "dense"] += group["params"]
        measure = self.log_is_due() or bool(self.watch.judges)
        if groups["table"] and (table_limit is not None or measure):
            self._clip_tables(groups["table"], table_limit)
        if any(p.grad is not None for p in groups["dense"]):
            if dense_limit is not None or measure:
                self._record_norm("dense", clip_by_norm(groups["dense"], dense_limit))
        elif measure and (engine := engine_of(self.trainer)) is not None:
            self._record_norm("dense", engine.gradient_norm())
        self.watch.judge()

    def _clip_tables(self, parameters: list[torch.nn.Parameter], limit: float | None) -> None:
        # Every table that learns by rows, also where this rank read none: its norm is a collective.
        tables = [t for t in self.model.value_tables if t.learning == "rows" or t.weight.grad is not None]
        weights = {id(table.weight) for table in tables}
        others = [p for p in parameters if id(p) not in weights and p.grad is not None]
        if tables:
            self._record_norm("table", clip_tables(tables, [p.grad for p in others if p.grad is not None], limit))
        elif others:
            self._record_norm("table", clip_by_norm(others, limit))

    def _record_norm(self, name: str, norm: Tensor) -> None:
        self.watch.figures[f"grad_norm_{name}"] = norm
        if self.log_is_due():
            self.log(f"train/grad_norm_{name}", norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Updates the weights, then passes the statistics of the step to each plugin that defines `after_step`.

        A step that a judge refuses leaves no trace: gradients and statistics are dropped, the schedule stands still.
        """
        self.watch.refused = False
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except StepRefused:
            drop_gradients(self.trainer, optimizer)
        if self._accumulates():
            return
        if self.table_optimizer is not None:
            if not self.watch.refused:
                self.table_optimizer.step()
            self.table_optimizer.zero_grad()
        if not self.watch.refused:
            self._after_step()
        self._reports.reset()
        self._step_nll, self.watch.figures = None, {}
        self._normaliser.reset()

    def _after_step(self) -> None:
        for layer, plugins in itertools.groupby(self.model.plugins(), key=lambda entry: entry[0]):
            stats = {name: sum_over_ranks(value) for name, value in self._reports.statistics(layer).items()}
            for _, name, plugin in plugins:
                stands_still = bool(self.config.get("finetune")) and is_frozen(plugin)
                if isinstance(plugin, HasAfterStep) and not stands_still:
                    plugin.after_step(plugin_entries(name, stats))

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Advances the schedule, unless the step was refused."""
        if not self.watch.refused:
            super().lr_scheduler_step(scheduler, metric)

    def log_is_due(self) -> bool:
        """Returns, within a micro-batch's hooks, whether it is the last of a step that logs."""
        return logs_at(self.trainer, self._step) and not self.trainer.fit_loop._should_accumulate()

    def on_validation_start(self) -> None:
        """Raises DataError if the ranks have different numbers of validation batches."""
        check_lengths(self.trainer, "val_dataloader", self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Raises DataError if the ranks have different numbers of test batches."""
        check_lengths(self.trainer, "test_dataloader", self.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        """Raises DataError if the ranks have different numbers of prediction batches."""
        check_lengths(self.trainer, "predict_dataloader", self.trainer.num_predict_batches)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch to a mean over all held-out target tokens.

        Letters: M positions with a target.
        """
        self._batches.check_heldout(self, batch, batch_idx)
        nll_M = token_nll(self.model, self.forward(batch).hidden_BTD, batch["labels"])
        if nll_M.numel():
            self.heldout_nll.update(nll_M.sum())
            self.heldout_targets.update(float(nll_M.numel()))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds the batch as in validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs loss and perplexity, weighted by tokens over all batches and ranks."""
        self._log_heldout("val")

    def on_test_epoch_end(self) -> None:
        """Logs the same for the test data."""
        self._log_heldout("test")

    def _log_heldout(self, prefix: str) -> None:
        targets = self.heldout_targets.compute()
        self._batches.check_heldout_targets(self, targets)
        loss = self.heldout_nll.compute() / targets
        self.heldout_nll.reset()
        self.heldout_targets.reset()
        # The metric is already summed over ranks; without `sync_dist` Lightning would warn that it is not.
        self.log(f"{prefix}/loss", loss, prog_bar=prefix == "val", sync_dist=True)
        self.log(f"{prefix}/perplexity", loss.exp(), sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Returns answers to `batch["prompt"]` as records with `index`, `prompt`, `answer`, and `sample` of several."""
        self._batches.check_prompts(self, batch, batch_idx)
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return answer_batch(self.model, tokenizer, batch, self.answering, device=self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the token counter, the digest of the tokenizer and the fingerprint of the data."""
        checkpoint["tokens_seen"] = int(self.tokens_seen)
        checkpoint["tokenizer"] = tokenizer_digest(data_of(self._trainer))
        checkpoint["data"] = fingerprint_of(data_of(self._trainer))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the token counter; raises CheckpointError for data of another tokenizer than that of the weights."""
        check_tokenizer(checkpoint, tokenizer_digest(data_of(self._trainer)))
        self.tokens_seen = torch.tensor(checkpoint["tokens_seen"], dtype=torch.int64)
