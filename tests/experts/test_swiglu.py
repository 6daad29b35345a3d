"""Stacked SwiGLU experts: each is the dense FFN of its own weights.

Letters: M rows sorted by expert, F hidden dimension.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.ffn import Dense, FFNContext


def test_each_expert_is_a_dense_ffn() -> None:
    experts = SwiGLUExperts(n_experts=3, dim=5, hidden_dim=7, n_layers=2).double()
    counts = [4, 0, 3]
    x_MD = torch.randn(7, 5, dtype=torch.float64)
    y_MD = experts(x_MD, torch.tensor(counts))
    for e, (rows_MD, expected_MD) in enumerate(zip(x_MD.split(counts), y_MD.split(counts), strict=True)):
        dense = Dense(dim=5, n_layers=2, hidden_dim=7).double()
        for mine, theirs in ((dense.gate, experts.gate), (dense.up, experts.up), (dense.out, experts.out)):
            mine.weight.data = theirs[e].T
        context = FFNContext(torch.zeros(1, len(rows_MD), dtype=torch.int64))
        assert_close(expected_MD, dense(rows_MD.unsqueeze(0), context).y_BTD.squeeze(0))


def test_initialisation_is_that_of_the_dense_ffn() -> None:
    experts = SwiGLUExperts(n_experts=3, dim=64, hidden_dim=100, n_layers=8)
    for e in range(3):
        assert experts.gate[e].std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert experts.up[e].std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert experts.out[e].std().item() == pytest.approx(100**-0.5 / 4, rel=0.05)
    assert not torch.equal(experts.gate[0], experts.gate[1])


def test_parameters_of_one_expert() -> None:
    experts = SwiGLUExperts(n_experts=4, dim=5, hidden_dim=7, n_layers=2)
    assert 4 * experts.params_per_expert() == sum(p.numel() for p in experts.parameters())
