"""Batch normalisation of queries that excludes padding, with statistics of the whole batch over all ranks.

It spreads the queries over the keys, so that more slots are used (Lample et al. 2019, arXiv 1907.05242, section 4.3).

Letters: F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pkm_lightning.ops import sum_over_ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


class MaskedBatchNorm(nn.Module):
    """Computes `(x - mean) / sqrt(var + eps) * weight + bias`, with the moments of the real tokens of all ranks.

    In training the output of a token depends on the whole micro-batch, later tokens included; in evaluation the running
    statistics are used. `after_step` updates them once per optimizer step, from sums over its micro-batches, so that a
    forward that activation checkpointing repeats does not count twice. They stay in fp32 (fp64 in an fp64 module)
    whatever dtype the module is cast to, since bf16 would round away most of an update with momentum 0.1.

    Args:
        features: number of features F.
        momentum: weight of the current step in the running statistics.
        eps: added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        for name in _RUNNING:
            self.register_buffer(name, torch.empty(features, dtype=_at_least_fp32(self.weight.dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets gain and running variance to 1, bias and running mean to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(
        self, x_TF: Float[Tensor, "T F"], valid_T: Bool[Tensor, " T"] | None = None
    ) -> tuple[Float[Tensor, "T F"], dict[str, Tensor]]:
        """Returns the features normalised, in the dtype of `x`, and sums for `after_step`, which evaluation leaves out.

        Collective in training: call on all ranks.
        """
        weight_F, bias_F = self.weight.to(x_TF.dtype), self.bias.to(x_TF.dtype)
        centred_TF = x_TF - self.running_mean.to(x_TF.dtype)
        if not self.training:
            return centred_TF * (self.running_var.to(x_TF.dtype) + self.eps).rsqrt() * weight_F + bias_F, {}
        real_T1 = None if valid_T is None else valid_T.unsqueeze(-1)
        real_TF = centred_TF if real_T1 is None else centred_TF.where(real_T1, 0)
        tokens = x_TF.new_full((), len(x_TF)) if valid_T is None else valid_T.sum().to(x_TF.dtype)
        count = sum_over_ranks(tokens).clamp(min=1)
        mean_F = sum_over_ranks(real_TF.sum(0)) / count
        deviation_TF = centred_TF - mean_F
        var_F = (
            sum_over_ranks((deviation_TF if real_T1 is None else deviation_TF.where(real_T1, 0)).square().sum(0))
            / count
        )
        y_TF = deviation_TF * (var_F + self.eps).rsqrt() * weight_F + bias_F
        # Sums of several micro-batches are added later, so all are taken about one point, the running mean. They may
        # cancel, hence float64, which MPS lacks.
        sum_dtype = torch.float32 if x_TF.device.type == "mps" else torch.float64
        values = (real_TF.detach(), real_TF.detach().square())
        sums_2F = torch.stack([value_TF.sum(0, dtype=sum_dtype) for value_TF in values])
        return y_TF, {"query_norm_tokens": tokens.to(sum_dtype), "query_norm_sums": sums_2F}

    @torch.no_grad()
    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Updates the running statistics by the sums of one optimizer step, if there are any."""
        count = stats.get("query_norm_tokens")
        if count is None:
            return
        # Without a real token the share is 0. A branch on the count would make the host wait for the device.
        share = (count > 0).to(self.running_mean.dtype) * self.momentum
        mean_F, square_F = (stats["query_norm_sums"] / count.clamp(min=1)).unbind()
        # The unbiased variance, as torch.nn.BatchNorm1d keeps it.
        var_F = (square_F - mean_F.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
        self.running_mean.add_(mean_F.to(self.running_mean.dtype) * share)
        self.running_var.lerp_(var_F.to(self.running_var.dtype), share)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in _RUNNING}
        super()._apply(fn, recurse)
        for name, old_F in before.items():
            new_F = getattr(self, name)
            dtype = _at_least_fp32(new_F.dtype)
            if new_F.dtype is not dtype:
                # From the values before the cast, which bf16 would already have rounded.
                setattr(self, name, new_F.to(dtype) if old_F.is_meta else old_F.to(new_F.device, dtype))
        return self


_RUNNING = ("running_mean", "running_var")


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
