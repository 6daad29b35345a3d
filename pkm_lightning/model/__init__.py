"""The transformer around the plugins: attention, blocks, placement, initialisation and cost."""

from pkm_lightning.model.accounting import ModelCost, model_cost
from pkm_lightning.model.placement import Placement
from pkm_lightning.model.transformer import Transformer
from pkm_lightning.model.trunk import ModelOutput, PartCost, Traces, Trunk

__all__ = ["ModelCost", "ModelOutput", "PartCost", "Placement", "Traces", "Transformer", "Trunk", "model_cost"]
