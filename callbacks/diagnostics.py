"""Diagnostics of what goes wrong before the loss does: norms, extreme scores and logits, saturation, update sizes.

At each log step the most extreme value over all layers is logged as `train/vitals/NAME`, and for loggers each layer's
own as `vitals/layerL.NAME`:

| name | quantity |
|---|---|
| attention_logit_max | the largest absolute attention logit |
| query_norm, key_norm | mean L2 norm of the queries and sub-keys of memories (per half of a product key) |
| score_max, score_min | the scores of the slots that are read |
| weight_top | mean share of the largest weight in a read: 1 is a saturated softmax |
| router_logit_max, router_top | routers: the largest absolute logit, the mean over tokens of the largest probability |
| memory_gate, memory_share | memories before a layer: mean gate, mean norm of their output over that of the stream |
| output_logit_max, log_partition | the largest absolute logit of the vocabulary, the mean of logsumexp |
| value_norm | root mean square of the L2 norms of a table's rows |
| update_ratio_GROUP | L2 norm of the step's update over that of the weights, per optimizer group |

All but the last two come from an extra forward of a few rows in evaluation mode. Update ratios are computed from at
most 2**18 evenly spaced values per parameter. A plugin adds figures of its own: see `pkm_lightning.ffn.base`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from pkm_lightning.errors import check_integer
from pkm_lightning.memory.replicas import norm_over_members
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.diagnostics import LayerDiagnostics, local_part, more_extreme, probe
from pkm_lightning.training.optimizer import parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pkm_lightning.memory import ValueTable

__all__ = ["Diagnostics", "Vitals"]

#: Logged names outlive those of the code: earlier runs, reports and dashboards have them.
_LOGGED = "vitals"
_SAMPLE = 2**18


class Diagnostics(L.Callback):
    """Logger of the table above; every rank looks at rows of its own, and the most extreme value counts.

    Args:
        rows: sequences of the batch that the forward gets.

    Attributes:
        figures: the last values by layer and name (layer None: the whole model).
        step: the optimizer step that they belong to, counted from 1.
    """

    def __init__(self, *, rows: int) -> None:
        check_integer("callbacks.diagnostics.rows", rows, low=1)
        self.rows = rows
        self.figures: LayerDiagnostics = {}
        self.step = 0
        self._before: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Keeps a sample of the weights, if a log is due."""
        assert isinstance(pl_module, LanguageModule)
        if pl_module.log_is_due():
            self._before = {
                name: [(parameter, _sample(parameter).clone()) for parameter in parameters]
                for name, parameters in _groups(pl_module).items()
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Computes and logs the figures after the update of a step that logs."""
        assert isinstance(pl_module, LanguageModule)
        if not pl_module.log_is_due():
            return
        with trainer.precision_plugin.forward_context():
            figures = probe(pl_module.model, batch, self.rows)
        whole = figures.setdefault(None, {})
        tables = [_row_norm(table) for table in _changing_tables(pl_module)]
        if tables:
            whole["value_norm"] = torch.stack([norm.to(tables[0]) for norm in tables]).amax()
        whole.update(self._update_ratios())
        self.figures, self.step = _over_ranks(figures, pl_module), trainer.global_step
        self._log(trainer, pl_module)

    def _update_ratios(self) -> dict[str, Tensor]:
        squares = {}
        for name, parts in self._before.items():
            pairs = [
                torch.stack([(_sample(parameter) - before).norm(), before.norm()]).double().square()
                for parameter, before in parts
            ]
            squares[name] = torch.stack([pair.to(pairs[0].device) for pair in pairs]).sum(0)
        self._before = {}
        # A parameter of which every rank holds a copy counts that many times in both sums.
        sums = {name: sum_over_ranks(pair) for name, pair in squares.items()}
        return {f"update_ratio_{name}": (moved / size.clamp(min=1e-30)).sqrt() for name, (moved, size) in sums.items()}

    def _log(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        overall: dict[str, Tensor] = {}
        for values in self.figures.values():
            for name, value in values.items():
                overall[name] = more_extreme(name, overall[name], value) if name in overall else value
        for name, value in overall.items():
            pl_module.log(f"train/{_LOGGED}/{name}", value)
        by_layer = {
            f"{_LOGGED}/layer{layer}.{name}": float(value)
            for layer, values in self.figures.items()
            if layer is not None
            for name, value in values.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(by_layer, step=self.step)


def _changing_tables(pl_module: LanguageModule) -> list[ValueTable]:
    """Returns the tables except those of a file, which may be larger than memory and never change."""
    return [table for table in pl_module.model.value_tables if table.stored is None]


def _groups(pl_module: LanguageModule) -> dict[str, list[Tensor]]:
    """Returns the model's own parameters by optimizer group; an engine's optimizer holds flat pieces of them."""
    tables = [table.weight for table in _changing_tables(pl_module)]
    groups: dict[str, list[Tensor]] = {"table": list(tables)}
    for group in parameter_groups(pl_module.model, pl_module.config["optim"]):
        others = [p for p in group["params"] if not any(p is table for table in tables)]
        groups.setdefault(group["name"], []).extend(others)
    return {name: parameters for name, parameters in groups.items() if parameters}


def _sample(parameter: Tensor) -> Tensor:
    """Returns at most 2**18 evenly spaced values of this rank's part."""
    local = local_part(parameter).reshape(-1)
    return local[:: -(-len(local) // _SAMPLE) or 1]


def _row_norm(table: Any) -> Tensor:
    weight = table.weight.detach()
    # In fp32 at least: the squares of a bf16 table would be rounded one by one.
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = norm_over_members(torch.linalg.vector_norm(weight, dtype=sum_dtype), table.mesh)
    root: Tensor = norm * table.rows**-0.5
    return root


def _over_ranks(figures: LayerDiagnostics, pl_module: LanguageModule) -> LayerDiagnostics:
    """Returns the most extreme values over the ranks, which hold the same names in the same order."""
    if pl_module.trainer.world_size == 1:
        return figures
    names = [(layer, name) for layer, values in figures.items() for name in values]
    signs = torch.tensor([-1.0 if name.endswith("_min") else 1.0 for _, name in names], device=pl_module.device)
    values = torch.stack([figures[layer][name].to(pl_module.device).float() for layer, name in names]) * signs
    # A maximum over ranks may lose NaN.
    values = torch.where(values.isfinite(), values, torch.full_like(values, float("inf")))
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    reduced: LayerDiagnostics = {}
    for (layer, name), value in zip(names, values * signs, strict=True):
        reduced.setdefault(layer, {})[name] = value
    return reduced


#: The name of `Diagnostics` in the saved configurations of versions before 0.2.
Vitals = Diagnostics
