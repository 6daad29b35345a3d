"""What holds of the grouped read of weighted_gather alone: empty groups, the sum over groups, refusals.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.ops import weighted_gather

BACKENDS = ["cpu", "triton", "eager", "reference"]


def inputs(n: int, d: int, t: int, k: int, g: int, backend: str) -> dict[str, Any]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return {
        "table_ND": torch.randn(n, d, device=device),
        "ids_TK": torch.randint(n, (t, k), device=device),
        "weights_TK": torch.rand(t, k, device=device),
        "groups_TK": torch.randint(g, (t, k), device=device),
        "n_groups": g,
        "backend": backend,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_groups_of_a_read_add_up_to_the_plain_read(backend: str) -> None:
    given = inputs(11, 7, 5, 6, 3, backend)
    plain_TD = weighted_gather(given["table_ND"], given["ids_TK"], given["weights_TK"], backend=backend)
    assert_close(weighted_gather(**given).sum(1), plain_TD)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_without_members_is_zero(backend: str) -> None:
    given = inputs(4, 3, 2, 3, 3, backend)
    y_TGD = weighted_gather(**given | {"groups_TK": 2 * (given["groups_TK"] // 2)})
    assert not y_TGD[:, 1].any()
    assert y_TGD.any()


def test_each_row_is_read_once_by_one_kernel() -> None:
    with torch.profiler.profile() as profile:
        weighted_gather(**inputs(11, 7, 5, 3, 4, "eager"))
    names = ("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
    assert sum(event.count for event in profile.key_averages() if event.key in names) == 1


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_runs_on_the_meta_device(backend: str) -> None:
    given = inputs(11, 7, 5, 3, 4, backend)
    meta = {name: part.to("meta") if isinstance(part, torch.Tensor) else part for name, part in given.items()}
    assert weighted_gather(**meta).shape == (5, 4, 7)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_refuses_groups_out_of_range(backend: str) -> None:
    given = inputs(4, 3, 2, 3, 2, backend)
    given["groups_TK"][1, 2] = 2
    with pytest.raises(ValueError, match=r"weighted_gather: groups has 2; allowed: 0 to 1\."):
        weighted_gather(**given)


def test_refuses_groups_that_do_not_fit() -> None:
    given = inputs(4, 3, 2, 3, 2, "eager")
    message = r"weighted_gather: needs integer groups of the shape \(2, 3\) of ids together with n_groups of 1 or more"
    with pytest.raises(ValueError, match=message + r", got None and n_groups=2\."):
        weighted_gather(**given | {"groups_TK": None})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.int64\) and n_groups=None\."):
        weighted_gather(**given | {"n_groups": None})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.int64\) and n_groups=0\."):
        weighted_gather(**given | {"n_groups": 0})
    with pytest.raises(ValueError, match=message + r", got \(\(3, 2\), torch.int64\) and n_groups=2\."):
        weighted_gather(**given | {"groups_TK": given["groups_TK"].T})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.float32\) and n_groups=2\."):
        weighted_gather(**given | {"groups_TK": given["groups_TK"].float()})
