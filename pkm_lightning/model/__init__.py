"""The transformer around the plugins: attention, blocks, placement, initialisation and cost."""

from pkm_lightning.model.accounting import ModelCost, model_cost
from pkm_lightning.model.placement import Placement
from pkm_lightning.model.transformer import ModelOutput, Traces, Transformer

__all__ = ["ModelCost", "ModelOutput", "Placement", "Traces", "Transformer", "model_cost"]
