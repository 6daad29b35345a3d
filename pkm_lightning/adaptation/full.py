"""`finetune=full`: every parameter learns, at rates for weights that are trained already."""

from __future__ import annotations

from torch import nn

from pkm_lightning.adaptation.method import Finetuning

__all__ = ["Full"]


class Full(Finetuning):
    """Finetuning of all parameters but those of `optim.freeze`; tables learn by `table.learning`."""

    def adapt(self, model: nn.Module) -> None:
        """Leaves the model as it is."""
