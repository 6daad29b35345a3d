"""What ZeRO-3 is given: modules whose parameters are used outside of their forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from pkm_lightning.strategies import DeepSpeed


class Trunk(nn.Module):
    """A pretrained model: no plugins, and no tied unembedding of its own."""

    tied_unembedding = None

    def plugins(self) -> list[tuple[int, str, nn.Module]]:
        return []


def test_a_model_without_plugins_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    started = []
    monkeypatch.setattr(DeepSpeedStrategy, "init_deepspeed", lambda self: started.append(self))
    monkeypatch.setattr(DeepSpeed, "_language_module", SimpleNamespace(model=Trunk()))
    strategy = DeepSpeed(stage=3)
    assert strategy.zero_stage_3
    strategy.init_deepspeed()
    assert started == [strategy]
