"""`ffn=pretrained`: the name of the FFN that a pretrained layer has, where a configuration chooses a plugin."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from pkm_lightning.errors import ConfigError

__all__ = ["PretrainedFFN"]


class PretrainedFFN(nn.Module):
    """The FFN of a pretrained layer, which transformers builds; no other model can be given one.

    Raises:
        ConfigError: always, since a trunk with FFNs of its own makes no plugins.
    """

    def __init__(self) -> NoReturn:
        raise ConfigError(
            "ffn=pretrained is the FFN of a pretrained model; set model=hf model.path=FOLDER, or choose another ffn."
        )
