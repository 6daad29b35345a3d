"""The causal convolution against sums that are written out, with and without documents."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close, assert_same_gradients
from torch import Tensor

from pkm_lightning.memory.causal_convolution import CausalConvolution


def written_out(conv: CausalConvolution, x_BTD: Tensor, doc_ids_BT: Tensor) -> Tensor:
    taps, dilation = conv.kernel_size[0], conv.dilation[0]
    y_BTD = torch.zeros_like(x_BTD)
    for b, t, tap in torch.cartesian_prod(*map(torch.arange, (*x_BTD.shape[:2], taps))).tolist():
        source = t - (taps - 1 - tap) * dilation
        if source >= 0 and doc_ids_BT[b, source] == doc_ids_BT[b, t]:
            y_BTD[b, t] = y_BTD[b, t] + conv.weight[:, 0, tap] * x_BTD[b, source]
    return y_BTD


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("kernel", "dilation"), [(4, 3), (1, 5), (3, 1)])
def test_taps_reach_back_within_the_document(kernel: int, dilation: int, documents: bool) -> None:
    conv = CausalConvolution(dim=5, kernel=kernel, dilation=dilation).double()
    assert not conv.weight.any()
    torch.nn.init.normal_(conv.weight)
    x_BTD = torch.randn(2, 17, 5, dtype=torch.float64, requires_grad=True)
    doc_ids_BT = torch.tensor([[0] * 4 + [1] * 13, [3] * 11 + [4] * 2 + [5] * 4])
    y_BTD = conv(x_BTD, doc_ids_BT if documents else None, length=17)
    expected_BTD = written_out(conv, x_BTD, doc_ids_BT if documents else torch.zeros_like(doc_ids_BT))
    assert_close(y_BTD, expected_BTD)
    assert_same_gradients(y_BTD, expected_BTD, {"x": x_BTD, "weight": conv.weight})
    # One token after as many others as its taps reach.
    last_B1D = conv(x_BTD[:, -1 - conv.context :], length=1)
    assert_close(last_B1D, conv(x_BTD, length=17)[:, -1:])
