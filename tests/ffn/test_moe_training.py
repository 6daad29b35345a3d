"""Loads of the experts after 500 steps on the facts, with each way of balancing.

Letters: L layers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import config
from training.fits import trainer

from pkm_lightning.build.run import resolve
from pkm_lightning.training import LanguageModule

STEPS = 500


def trained(*overrides: str) -> tuple[LanguageModule, Any]:
    """Trains the default model with the mixture of its YAML, 64 experts and 8 per token; returns it with its data."""
    fixed = ("model.vocab_size=auto", "model.n_layers=2", f"trainer.max_steps={STEPS}")
    run = resolve(config("ffn=moe", *fixed, *overrides))
    module, data = LanguageModule(run.config), run.data
    trainer(max_steps=STEPS, max_epochs=-1, limit_val_batches=0, log_every_n_steps=50).fit(module, datamodule=data)
    return module, data


def relative_loads(module: LanguageModule, data: Any) -> Tensor:
    """Computes each layer's expert loads over their mean, from the real tokens of 20 training batches."""
    model, loads = module.model.eval(), []
    with torch.no_grad():
        for batch in itertools.islice(data.train_dataloader(), 20):
            real = batch.get("valid", torch.ones_like(batch["input_ids"], dtype=torch.bool))
            output = model(
                batch["input_ids"], doc_ids_BT=batch.get("doc_ids"), valid_BT=batch.get("valid"), observe=True
            )
            traces = [output.traces[layer]["expert_ids"][real].flatten() for layer in sorted(output.traces)]
            loads.append(torch.stack([torch.bincount(ids, minlength=64) for ids in traces]))
    total_LE = torch.stack(loads).sum(0).float()
    return total_LE / total_LE.mean(dim=1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_every_expert_is_used_between_half_and_twice_the_mean(balancing: str) -> None:
    loads_LE = relative_loads(*trained(f"ffn.balancing={balancing}"))
    assert loads_LE.shape == (2, 64)
    assert loads_LE.min() > 0.5, loads_LE
    assert loads_LE.max() < 2, loads_LE


@pytest.mark.slow
def test_without_balancing_some_experts_starve() -> None:
    """Shows the loads that the test above would measure without any balancing."""
    loads_LE = relative_loads(*trained("ffn.balancing=none"))
    assert loads_LE.min() < 0.5, loads_LE
    assert loads_LE.max() > 2, loads_LE
