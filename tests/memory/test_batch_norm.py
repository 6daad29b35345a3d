"""The masked batch normalisation against torch's own on the real tokens, its statistics, and two ranks against one.

Letters: T tokens, F features.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerances import assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pkm_lightning.memory.batch_norm import MaskedBatchNorm

VALID_T = torch.tensor([True, True, False, True, True, False, True])


def pair(features: int = 3, dtype: torch.dtype = torch.float64) -> tuple[MaskedBatchNorm, torch.nn.BatchNorm1d]:
    """Builds ours and torch's, with equal gains, biases and running statistics that are not those of the start."""
    ours, theirs = MaskedBatchNorm(features).to(dtype), torch.nn.BatchNorm1d(features).to(dtype)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
        theirs.bias.normal_()
        theirs.running_mean.normal_(3.0)
        theirs.running_var.uniform_(0.5, 2.0)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "tracked" not in name})
    return ours, theirs


@pytest.mark.parametrize("valid_T", [None, VALID_T])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_equals_torch_on_the_real_tokens(valid_T: Tensor | None, offset: float) -> None:
    ours, theirs = pair()
    x_TF = (torch.randn(7, 3, dtype=torch.float64) + offset).requires_grad_()
    real_T = torch.ones(7, dtype=torch.bool) if valid_T is None else valid_T
    y_TF, stats = ours(x_TF, valid_T)
    expected_TF = theirs(x_TF[real_T])
    assert_close(y_TF[real_T], expected_TF)
    upstream_TF = torch.randn_like(expected_TF)
    actual = torch.autograd.grad(y_TF[real_T], [x_TF, *ours.parameters()], upstream_TF)
    for grad, expected in zip(
        actual, torch.autograd.grad(expected_TF, [x_TF, *theirs.parameters()], upstream_TF), strict=True
    ):
        assert_close(grad, expected, kind="grad")
    ours.after_step(stats)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)
    ours.eval()
    theirs.eval()
    assert_close(ours(x_TF, valid_T)[0], theirs(x_TF))
    assert ours(x_TF, valid_T)[1] == {}


def test_what_padding_holds_changes_nothing() -> None:
    ours, _ = pair()
    x_TF = torch.randn(7, 3, dtype=torch.float64)
    y_TF, stats = ours(x_TF, VALID_T)
    spoilt_TF = x_TF.masked_fill(~VALID_T.unsqueeze(-1), torch.nan)
    spoilt_y_TF, spoilt_stats = ours(spoilt_TF, VALID_T)
    assert torch.equal(spoilt_y_TF[VALID_T], y_TF[VALID_T])
    assert all(torch.equal(stats[name], spoilt_stats[name]) for name in stats)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_real_token_and_one_give_finite_numbers(tokens: int) -> None:
    ours, _ = pair()
    before_F = ours.running_var.clone()
    y_TF, stats = ours(torch.randn(4, 3, dtype=torch.float64), torch.arange(4) < tokens)
    ours.after_step(stats)
    assert torch.equal(ours.running_var, before_F) is (tokens == 0)
    assert all(bool(value.isfinite().all()) for value in (y_TF, ours.running_mean, ours.running_var))


def test_statistics_of_a_step_are_those_of_its_micro_batches_together() -> None:
    """Sums over micro-batches, as the module takes them, move the running statistics as one whole batch would."""
    ours, theirs = pair()
    x_TF = torch.randn(9, 3, dtype=torch.float64)
    first, second = ours(x_TF[:4])[1], ours(x_TF[4:])[1]
    ours.after_step({name: first[name] + second[name] for name in first})
    theirs(x_TF)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)


def test_a_recomputed_forward_moves_nothing() -> None:
    ours, _ = pair()
    before_F = ours.running_mean.clone()
    x_TF = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y_TF, stats = checkpoint(ours, x_TF, use_reentrant=False)
    y_TF.sum().backward()
    assert torch.equal(ours.running_mean, before_F)
    assert stats["query_norm_tokens"] == 7


def test_running_statistics_stay_in_fp32() -> None:
    ours = MaskedBatchNorm(3)
    torch.nn.init.constant_(ours.running_mean, 1 + 2**-20)
    for moved in (ours.to(torch.bfloat16), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.float()):
        assert moved.running_mean.dtype is torch.float32
        assert torch.equal(moved.running_mean, torch.full((3,), 1 + 2**-20))
    assert ours.to(torch.bfloat16).weight.dtype is torch.bfloat16
    assert ours.double().running_mean.dtype is torch.float64
    with torch.device("meta"):
        empty = MaskedBatchNorm(3).to(torch.bfloat16)
    assert empty.to_empty(device="cpu").running_mean.dtype is torch.float32


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    given = torch.load(f"{folder}/given.pt")
    ours, _ = pair()
    ours.load_state_dict(given["state"])
    share = slice(0, 3) if rank == 0 else slice(3, None)
    x_TF = given["x"][share].requires_grad_()
    y_TF, stats = ours(x_TF, given["valid"][share])
    grads = torch.autograd.grad(y_TF, [x_TF, *ours.parameters()], given["upstream"][share])
    torch.save({"y": y_TF.detach(), "grads": grads, "stats": stats}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    ours, _ = pair()
    x_TF = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    upstream_TF = torch.randn_like(x_TF)
    given = {"state": ours.state_dict(), "x": x_TF.detach(), "valid": VALID_T, "upstream": upstream_TF}
    torch.save(given, tmp_path / "given.pt")
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    y_TF, stats = ours(x_TF, VALID_T)
    x_grad_TF, *grads = torch.autograd.grad(y_TF, [x_TF, *ours.parameters()], upstream_TF)
    assert_close(torch.cat([part["y"] for part in parts]), y_TF)
    assert_close(torch.cat([part["grads"][0] for part in parts]), x_grad_TF, kind="grad")
    for i, grad in enumerate(grads, 1):
        assert_close(parts[0]["grads"][i] + parts[1]["grads"][i], grad, kind="grad")
    for name, value in stats.items():
        assert_close(parts[0]["stats"][name] + parts[1]["stats"][name], value)
