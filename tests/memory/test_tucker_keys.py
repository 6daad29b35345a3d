"""Tucker keys against the scores of all n * n slots: both stages, exactness, initialisation, precision.

Letters: T tokens, D model dimension, H heads, C cores, R Tucker rank, S sub-keys per half, A = S * S slots, K slots
read.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ffn import brute_force_tucker as brute_force
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.memory import TuckerKeys
from pkm_lightning.memory.tucker_keys import leading_pair, selected_moments

SIZES: list[dict[str, Any]] = [
    {"dim": 6, "heads": 1, "n_keys": 5, "key_dim": 3, "knn": 1, "rank": 1, "cores": 1},
    {"dim": 7, "heads": 3, "n_keys": 9, "key_dim": 5, "knn": 4, "rank": 2, "cores": 1},
    {"dim": 5, "heads": 2, "n_keys": 7, "key_dim": 4, "knn": 10, "rank": 3, "cores": 3},
    {"dim": 4, "heads": 1, "n_keys": 1, "key_dim": 1, "knn": 1, "rank": 1, "cores": 2},
]


def tucker_keys(
    sizes: dict[str, Any], *, query_per_rank: bool = False, dtype: torch.dtype = torch.float64, **changes: Any
) -> TuckerKeys:
    """Builds keys whose gains and cores are not at their initial values."""
    keys = TuckerKeys(**{**sizes, **changes}, query_per_rank=query_per_rank)
    for parameter in (keys.query_norm.weight, keys.key_norm.weight):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.init.normal_(keys.cores)
    return keys.to(dtype)


@pytest.mark.parametrize("query_per_rank", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_selects_and_scores_by_two_stages(sizes: dict[str, Any], query_per_rank: bool) -> None:
    keys = tucker_keys(sizes, query_per_rank=query_per_rank)
    x_TD = torch.randn(6, sizes["dim"], dtype=torch.float64, requires_grad=True)
    read, expected = keys(x_TD), brute_force.all_scores(keys, x_TD)
    ids_THK = brute_force.two_stage(expected, sizes["knn"])
    assert read.ids_THK.dtype is torch.int32
    assert torch.equal(read.ids_THK, ids_THK.int())
    expected_THCK = expected.grid_THCA.gather(-1, ids_THK.unsqueeze(2).expand(-1, -1, sizes["cores"], -1))
    assert_close(read.scores_THCK, expected_THCK)
    assert_close(read.row_HTS.transpose(0, 1), expected.row_THS)
    assert_close(read.column_HTS.transpose(0, 1), expected.column_THS)
    inputs = [x_TD, *keys.parameters()]
    upstream_THCK = torch.randn_like(expected_THCK)
    actual_grads = torch.autograd.grad(read.scores_THCK, inputs, upstream_THCK)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected_THCK, inputs, upstream_THCK), strict=True):
        assert_close(actual, wanted, kind="grad")


@pytest.mark.parametrize("query_per_rank", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_exact_where_all_rows_are_preselected(rank: int, query_per_rank: bool) -> None:
    keys = tucker_keys(SIZES[1], query_per_rank=query_per_rank, knn=9, rank=rank, cores=2)
    x_TD = torch.randn(20, 7, dtype=torch.float64)
    total_THA = brute_force.all_scores(keys, x_TD).grid_THCA.sum(2)
    assert torch.equal(keys(x_TD).ids_THK, total_THA.topk(9, dim=-1).indices.int())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_is_exact_for_cores_of_rank_one_among_slots_of_positive_factors(rank: int) -> None:
    keys = tucker_keys(SIZES[1], rank=rank, cores=2, n_keys=31, knn=3)
    with torch.no_grad():
        keys.cores.copy_(
            torch.einsum("hca,hb->hcab", torch.rand(3, 2, 1) * torch.randn(3, 1, rank), torch.randn(3, rank))
        )
    x_TD = torch.randn(20, 7, dtype=torch.float64)
    scores = brute_force.all_scores(keys, x_TD)
    positive_THA = ((scores.row_THS > 0).unsqueeze(-1) & (scores.column_THS > 0).unsqueeze(-2)).flatten(-2)
    assert bool((positive_THA.sum(-1) >= 3).all())
    best_THK = scores.grid_THCA.sum(2).masked_fill(~positive_THA, -torch.inf).topk(3, dim=-1).indices
    enough_TH = ((scores.row_THS > 0).sum(-1) >= 3) & ((scores.column_THS > 0).sum(-1) >= 3)
    assert enough_TH.double().mean() > 0.9
    assert torch.equal(keys(x_TD).ids_THK[enough_TH], best_THK[enough_TH].int())


def found_share(keys: TuckerKeys, x_TD: Tensor, *, positive: bool) -> float:
    """Returns the share of the best K of all A slots, or of those with positive factors, that the two stages find."""
    scores = brute_force.all_scores(keys, x_TD)
    total_THA = scores.grid_THCA.sum(2)
    if positive:
        pairs_THSS = (scores.row_THS > 0).unsqueeze(-1) & (scores.column_THS > 0).unsqueeze(-2)
        total_THA = total_THA.masked_fill(~pairs_THSS.flatten(-2), -torch.inf)
    best_THK = total_THA.topk(keys.knn, dim=-1).indices
    found_THKK = keys(x_TD).ids_THK.unsqueeze(-1) == best_THK.unsqueeze(-2)
    return found_THKK.any(-2).double().mean().item()


def test_is_approximate_for_other_cores() -> None:
    """Uses Gaussian cores of rank 3: some slots of positive factors are missed, and of all slots about half."""
    keys, x_TD = tucker_keys(SIZES[1], rank=3, n_keys=31, knn=5), torch.randn(50, 7, dtype=torch.float64)
    assert 0.3 < found_share(keys, x_TD, positive=False) < 0.7
    assert 0.5 < found_share(keys, x_TD, positive=True) < 0.99


def test_equal_scores_rank_by_lower_sub_key() -> None:
    keys = tucker_keys(SIZES[1], cores=1)
    with torch.no_grad():
        keys.keys.copy_(torch.randn(3, 2, 2, 1, 5).expand_as(keys.keys))
    ids_THK = keys(torch.randn(4, 7, dtype=torch.float64)).ids_THK
    assert torch.equal(ids_THK, torch.tensor([0, 1, 2, 3], dtype=torch.int32).expand(4, 3, 4))


def test_the_leading_pair_and_its_sign() -> None:
    core_HRR = torch.randn(50, 3, 3, dtype=torch.float64)
    u_HR, t_HR = leading_pair(core_HRR, torch.ones(50, 2, 3))
    assert_close(torch.einsum("ha,hab,hb->h", u_HR, core_HRR, t_HR), torch.linalg.matrix_norm(core_HRR, ord=2))
    assert bool((u_HR.sum(-1) + t_HR.sum(-1) >= 0).all())
    one_HR, other_HR = leading_pair(torch.tensor([[[-2.0]], [[3.0]]]), torch.ones(2, 2, 1))
    assert torch.equal(torch.stack([one_HR, other_HR]), torch.tensor([[[1.0], [1.0]], [[-1.0], [1.0]]]))


def test_the_pair_turns_with_the_core_and_checkpoints_keep_it() -> None:
    """Turns u = t by half a circle: their sum changes its sign on the way, but no slot may be exchanged for it."""
    keys, x_TD = tucker_keys(SIZES[1], cores=1), torch.randn(5, 7, dtype=torch.float64)
    rows = []
    for angle in torch.linspace(0, torch.pi, 200, dtype=torch.float64):
        u_R = torch.stack([angle.cos(), angle.sin()])
        with torch.no_grad():
            keys.cores.copy_(torch.outer(u_R, u_R).expand_as(keys.cores))
        read = keys(x_TD)
        rows.append(read.row_HTS)
        keys.after_step({name: 3 * value for name, value in read.step_stats.items()})
    change = torch.stack([(after - before).norm() / before.norm() for before, after in itertools.pairwise(rows)])
    assert float(change.max()) < 0.1
    assert_close(rows[-1], -rows[0])
    loaded = tucker_keys(SIZES[1], cores=1).eval()
    loaded.load_state_dict(keys.state_dict())
    assert torch.equal(loaded(x_TD).row_HTS, rows[-1])
    older = {name: value for name, value in keys.state_dict().items() if name != "pair"}
    loaded = tucker_keys(SIZES[1], cores=1).eval()
    loaded.load_state_dict(older)
    assert torch.equal(loaded(x_TD).row_HTS, -rows[-1])


def test_cores_that_are_not_finite_give_scores_that_are_not() -> None:
    keys = tucker_keys(SIZES[1])
    torch.nn.init.constant_(keys.cores, torch.nan)
    read = keys(torch.randn(4, 7, dtype=torch.float64))
    assert bool(read.scores_THCK.isnan().all())
    assert bool((read.ids_THK >= 0).all() & (read.ids_THK < 81).all())
    assert bool(keys.spectrum().isfinite().all())


def test_the_spectrum_and_its_gradient() -> None:
    keys = tucker_keys(SIZES[2])
    assert_close(keys.spectrum(), torch.linalg.svdvals(keys.cores.sum(1)))
    keys.spectrum().sum().backward()
    assert keys.cores.grad is not None
    left_HRR, _, right_HRR = torch.linalg.svd(keys.cores.detach().sum(1))
    assert_close(keys.cores.grad, (left_HRR @ right_HRR).unsqueeze(1).expand_as(keys.cores), kind="grad")


@pytest.mark.parametrize(("n_keys", "knn"), [(16, 4), (64, 8), (256, 32)])
def test_moments_of_the_selected_scores(n_keys: int, knn: int) -> None:
    """Compares with draws of two sets of normals, from which Blom's formula deviates by some percent."""
    rows_TM, columns_TM = (torch.randn(2000, n_keys).topk(knn).values for _ in range(2))
    best_TK = (rows_TM.unsqueeze(-1) * columns_TM.unsqueeze(-2)).flatten(1).topk(knn).values
    mean, spread = selected_moments(n_keys, knn)
    assert mean == pytest.approx(best_TK.mean().item(), rel=0.05)
    assert spread == pytest.approx((best_TK.var(dim=1, correction=0).mean() / best_TK.mean() ** 2).item(), abs=0.02)
    assert selected_moments(1, 1) == (0.0, 0.0)
    # All slots are read: the mean would be 0 but for rounding, and counts as half of the root mean square.
    assert selected_moments(8, 64)[1] == pytest.approx(4)


@pytest.mark.parametrize("query_per_rank", [False, True])
def test_selected_scores_start_with_mean_one(query_per_rank: bool) -> None:
    keys = TuckerKeys(dim=32, heads=4, n_keys=64, key_dim=24, knn=8, rank=3, cores=2, query_per_rank=query_per_rank)
    scores_THCK = keys(torch.randn(300, 32)).scores_THCK
    assert scores_THCK.mean().item() == pytest.approx(1, rel=0.1)
    assert keys.spectrum()[:, 0].mean().item() == pytest.approx(1, rel=0.05)
    # The noise of the cores leaves the preselection as good as exact.
    assert found_share(keys, torch.randn(20, 32), positive=True) > 0.99


@pytest.mark.parametrize("query_per_rank", [False, True])
def test_bf16_and_autocast_score_in_fp32(query_per_rank: bool) -> None:
    x_TD = torch.randn(5, 7)
    for dtype in (torch.bfloat16, torch.float32):
        keys = tucker_keys(SIZES[1], query_per_rank=query_per_rank, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.float32):
            q_TF = keys.query(x_TD.to(dtype))
            read = keys(x_TD.to(dtype))
        assert q_TF.dtype is torch.bfloat16
        assert read.scores_THCK.dtype is torch.float32
        expected = brute_force.all_scores(keys, x_TD.double(), q_TF.double())
        ids_THK = brute_force.two_stage(expected, 4)
        assert torch.equal(read.ids_THK, ids_THK.int())
        assert_close(read.scores_THCK, expected.grid_THCA.gather(-1, ids_THK.unsqueeze(2)))


@pytest.mark.parametrize("query_per_rank", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_flops_are_counted_exactly(sizes: dict[str, Any], query_per_rank: bool) -> None:
    keys = tucker_keys(sizes, query_per_rank=query_per_rank)
    with FlopCounterMode(display=False) as counter:
        keys(torch.randn(10, sizes["dim"], dtype=torch.float64))
    assert keys.flops() * 10 == counter.get_total_flops()
