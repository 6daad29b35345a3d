"""Weights of a model in which nothing is zero."""

from __future__ import annotations

import torch
from torch import nn

from pkm_lightning.model import Transformer


def draw(model: Transformer) -> None:
    """Draws every weight, also those that start at zero: what they do would not be seen."""
    model.init_weights(3)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2, generator=generator)
