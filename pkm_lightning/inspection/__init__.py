"""Looking into a trained model: which slots each token reads, what the reads add, and what is left without them."""

from pkm_lightning.inspection.ablation import ablate, add_ablation
from pkm_lightning.inspection.masking import mask
from pkm_lightning.inspection.record import Record
from pkm_lightning.inspection.slot_readings import add_slot_readings
from pkm_lightning.inspection.tracing import trace

__all__ = ["Record", "ablate", "add_ablation", "add_slot_readings", "mask", "trace"]
