"""Looks at what goes wrong before the loss does: norms, extremes of scores and logits, saturation, sizes of updates.

At each log step, as `train/vitals/NAME` the most extreme value of all layers, and for loggers `vitals/layerL.NAME`:

| name | of |
|---|---|
| attention_logit_max | the largest absolute attention logit |
| query_norm, key_norm | mean L2 norm of the queries and sub-keys of memories (half of a product key's each) |
| score_max, score_min | the scores of the slots that are read |
| weight_top | mean share of the largest weight in a read: 1 is a saturated softmax |
| router_logit_max, router_top | routers: the largest absolute logit, the mean of a token's largest probability |
| output_logit_max, log_partition | the largest absolute logit of the vocabulary, the mean of logsumexp |
| value_norm | root mean square of the L2 norms of a table's rows |
| update_ratio_GROUP | L2 norm of the step's update over that of the weights, of an optimizer group |

All but the last come from a forward of a few rows in evaluation mode, apart from the step. Update ratios are of at most
2**18 evenly spaced values of each parameter. A plugin adds its own: see `pkm_lightning.ffn.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from pkm_lightning.callbacks.stopwatch import step_logs, step_will_log
from pkm_lightning.errors import check_integer
from pkm_lightning.memory.replicas import norm_over_members
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import Diagnostics as Found
from pkm_lightning.training.diagnostics import held_part, probe, worse
from pkm_lightning.training.optimizer import parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

_SAMPLE = 2**18


class Diagnostics(L.Callback):
    """Logs the table above; all ranks take part, each with rows of its own, and the most extreme counts.

    Args:
        rows: rows of the batch that the forward is given.

    Attributes:
        found: the last values by layer (None: of the whole model).
        step: the optimizer step that they are of, counted from 1.
    """

    def __init__(self, *, rows: int) -> None:
        check_integer("callbacks.diagnostics.rows", rows, low=1)
        self.rows = rows
        self.found: Found = {}
        self.step = 0
        self._before: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Keeps a sample of the weights, if the step is looked at."""
        assert isinstance(pl_module, LanguageModule)
        if step_will_log(trainer):
            self._before = {
                name: [(parameter, _sample(parameter).clone()) for parameter in parameters]
                for name, parameters in _groups(pl_module).items()
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks, after the last micro-batch of a step that logs."""
        assert isinstance(pl_module, LanguageModule)
        if not step_logs(trainer):
            return
        with trainer.precision_plugin.forward_context():
            found = probe(pl_module.model, batch, self.rows)
        whole = found.setdefault(None, {})
        tables = [_row_norm(table) for table in pl_module.model.value_tables]
        if tables:
            whole["value_norm"] = torch.stack([norm.to(tables[0].device) for norm in tables]).amax()
        whole.update(self._update_ratios())
        self.found, self.step = _over_ranks(found, pl_module), trainer.global_step
        self._log(trainer, pl_module)

    def _update_ratios(self) -> dict[str, Tensor]:
        squares = {}
        for name, parts in self._before.items():
            pairs = [
                torch.stack([(_sample(parameter) - was).norm(), was.norm()]).double().square()
                for parameter, was in parts
            ]
            squares[name] = torch.stack([pair.to(pairs[0].device) for pair in pairs]).sum(0)
        self._before = {}
        # Where ranks hold copies, all of them count as often.
        sums = {name: sum_over_ranks(pair) for name, pair in squares.items()}
        return {f"update_ratio_{name}": (moved / size.clamp(min=1e-30)).sqrt() for name, (moved, size) in sums.items()}

    def _log(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        overall: dict[str, Tensor] = {}
        for values in self.found.values():
            for name, value in values.items():
                overall[name] = worse(name, overall[name], value) if name in overall else value
        for name, value in overall.items():
            pl_module.log(f"train/vitals/{name}", value)
        by_layer = {
            f"vitals/layer{layer}.{name}": float(value)
            for layer, values in self.found.items()
            if layer is not None
            for name, value in values.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(by_layer, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _groups(pl_module: LanguageModule) -> dict[str, list[Tensor]]:
    """The model's own parameters by optimizer group; those of an engine hold flat pieces, or nothing between steps."""
    tables = [table.weight for table in pl_module.model.value_tables]
    groups: dict[str, list[Tensor]] = {"table": list(tables)}
    for group in parameter_groups(pl_module.model, pl_module.config["optim"]):
        others = [p for p in group["params"] if not any(p is table for table in tables)]
        groups.setdefault(group["name"], []).extend(others)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _sample(parameter: Tensor) -> Tensor:
    """Evenly spaced values of what this rank holds, at most 2**18."""
    held = held_part(parameter).reshape(-1)
    return held[:: -(-len(held) // _SAMPLE) or 1]


def _row_norm(table: Any) -> Tensor:
    norm = norm_over_members(torch.linalg.vector_norm(table.weight.detach(), dtype=torch.float32), table.mesh)
    root: Tensor = norm * table.rows**-0.5
    return root


def _over_ranks(found: Found, pl_module: LanguageModule) -> Found:
    """The most extreme of all ranks, which hold the same names in the same order."""
    if pl_module.trainer.world_size == 1:
        return found
    names = [(layer, name) for layer, values in found.items() for name in values]
    signs = torch.tensor([-1.0 if name.endswith("_min") else 1.0 for _, name in names], device=pl_module.device)
    values = torch.stack([found[layer][name].to(pl_module.device).float() for layer, name in names]) * signs
    # A maximum need not keep what is no number.
    values = torch.where(values.isfinite(), values, torch.full_like(values, float("inf")))
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    reduced: Found = {}
    for (layer, name), value in zip(names, values * signs, strict=True):
        reduced.setdefault(layer, {})[name] = value
    return reduced
