"""Scores are computed outside autocast, in fp32 or wider."""

from __future__ import annotations

import pytest
import torch

from pkm_lightning.memory.precision import ieee_scores, score_dtype


@pytest.mark.parametrize(
    ("given", "scores"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_score_dtype(given: torch.dtype, scores: torch.dtype) -> None:
    assert score_dtype(torch.zeros(1, dtype=given)) is scores


def test_autocast_is_off_inside_and_on_again_after_an_error() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with ieee_scores(x):
            assert (x @ x).dtype is torch.float32
        with pytest.raises(RuntimeError), ieee_scores(x):
            _ = x @ torch.ones(3)
        assert (x @ x).dtype is torch.bfloat16


@pytest.mark.gpu
def test_tf32_is_off_inside_and_on_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    with ieee_scores(torch.ones(1, device="cuda")):
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
