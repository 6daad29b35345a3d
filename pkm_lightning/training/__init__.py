"""Training: the LightningModule, its optimizer groups and schedules, scoring, and building it all from a config."""

from pkm_lightning.training.module import LanguageModule

__all__ = ["LanguageModule"]
