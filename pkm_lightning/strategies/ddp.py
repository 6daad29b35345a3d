"""DDP: one copy of the dense model per rank, gradients averaged over the ranks."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from pkm_lightning.strategies.portable import PortableCheckpoints
from pkm_lightning.supervision.launcher import WatchedRanks

__all__ = ["DDP"]


class DDP(PortableCheckpoints, WatchedRanks, DDPStrategy):
    """Lightning's `DDPStrategy` with its arguments, for models whose tables are split or copied over the ranks."""

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        if not any(p.requires_grad for name, p in model.named_parameters() if name not in ignored):
            # Only tables learn: torch's DDP refuses a model without a gradient to average.
            return model
        return super()._setup_model(model)

    def _register_ddp_hooks(self) -> None:
        if self.model is not self.lightning_module:
            super()._register_ddp_hooks()
