"""weighted_gather with groups: empty groups, the sum over groups, one kernel, refusals.

Letters: G groups per token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close

from pkm_lightning.ops import weighted_gather


def inputs(n: int, d: int, t: int, k: int, g: int, backend: str) -> dict[str, Any]:
    device = device_of(backend)
    return {
        "table_NV": torch.randn(n, d, device=device),
        "ids_TK": torch.randint(n, (t, k), device=device),
        "weights_TK": torch.randn(t, k, device=device),
        "groups_TK": torch.randint(g, (t, k), device=device),
        "n_groups": g,
        "backend": backend,
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_groups_add_up_to_the_sum_without_groups(backend: str) -> None:
    arguments = inputs(11, 7, 5, 6, 3, backend)
    plain_TV = weighted_gather(arguments["table_NV"], arguments["ids_TK"], arguments["weights_TK"], backend=backend)
    assert_close(weighted_gather(**arguments).sum(1), plain_TV)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_without_reads_is_zero(backend: str) -> None:
    arguments = inputs(4, 3, 2, 3, 3, backend)
    y_TGV = weighted_gather(**arguments | {"groups_TK": 2 * (arguments["groups_TK"] // 2)})
    assert not y_TGV[:, 1].any()
    assert y_TGV.any()


def test_each_row_is_read_once_by_one_kernel() -> None:
    with torch.profiler.profile() as profile:
        weighted_gather(**inputs(11, 7, 5, 3, 4, "eager"))
    names = ("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
    assert sum(event.count for event in profile.key_averages() if event.key in names) == 1


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_runs_on_the_meta_device(backend: str) -> None:
    arguments = inputs(11, 7, 5, 3, 4, backend)
    meta = {name: part.to("meta") if isinstance(part, torch.Tensor) else part for name, part in arguments.items()}
    assert weighted_gather(**meta).shape == (5, 4, 7)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_refuses_groups_out_of_range(backend: str) -> None:
    arguments = inputs(4, 3, 2, 3, 2, backend)
    arguments["groups_TK"][1, 2] = 2
    with pytest.raises(ValueError, match=r"weighted_gather: groups has 2; allowed: 0 to 1\."):
        weighted_gather(**arguments)


def test_refuses_groups_that_do_not_fit() -> None:
    arguments = inputs(4, 3, 2, 3, 2, "eager")
    message = r"weighted_gather: needs integer groups of the shape \(2, 3\) of ids together with n_groups of 1 or more"
    with pytest.raises(ValueError, match=message + r", got None and n_groups=2\."):
        weighted_gather(**arguments | {"groups_TK": None})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.int64\) and n_groups=None\."):
        weighted_gather(**arguments | {"n_groups": None})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.int64\) and n_groups=0\."):
        weighted_gather(**arguments | {"n_groups": 0})
    with pytest.raises(ValueError, match=message + r", got \(\(3, 2\), torch.int64\) and n_groups=2\."):
        weighted_gather(**arguments | {"groups_TK": arguments["groups_TK"].T})
    with pytest.raises(ValueError, match=message + r", got \(\(2, 3\), torch.float32\) and n_groups=2\."):
        weighted_gather(**arguments | {"groups_TK": arguments["groups_TK"].float()})
