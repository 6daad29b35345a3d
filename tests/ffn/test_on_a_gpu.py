"""Every plugin on a GPU against the same plugin on the CPU: outputs, losses, gradients, decoding, half precision."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from ffn.plugin_contract import Case, built, ids, run
from ffn.test_every_plugin import CASES
from tolerances import assert_close, assert_same_on_devices

from pkm_lightning.model import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("case", CASES, ids=str)]


@pytest.fixture
def models(case: Case) -> list[Transformer]:
    """The model on the CPU, and a copy on the GPU; without dropout and noise, which differ by device."""
    return [copy.deepcopy(built(case)).eval().to(device) for device in ("cpu", "cuda")]


def test_outputs_and_gradients(models: list[Transformer]) -> None:
    valid_BT, upstream_BTD = torch.ones(2, 9, dtype=torch.bool), torch.randn(2, 9, 14)
    valid_BT[1, 6:] = False
    outputs = []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        output = run(model, ids().to(device), valid_BT=valid_BT.to(device))
        weight_BTD = (upstream_BTD * valid_BT.unsqueeze(-1)).to(device)
        (output.hidden_BTD * weight_BTD).sum().add(sum(output.aux_losses.values())).backward()
        outputs.append(output)
    expected, actual = outputs
    assert actual.hidden_BTD.is_cuda
    assert_close(actual.hidden_BTD.cpu()[valid_BT], expected.hidden_BTD[valid_BT])
    assert actual.aux_losses.keys() == expected.aux_losses.keys()
    for name, loss in expected.aux_losses.items():
        assert_close(actual.aux_losses[name].cpu(), loss)
    for layer, stats in expected.step_stats.items():
        for name, value in stats.items():
            assert_close(actual.step_stats[layer][name].cpu().float(), value.float())
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert_same_on_devices(q.grad, p.grad, name)


def test_a_cache_gives_the_full_forward(models: list[Transformer]) -> None:
    model = models[1]
    if not model.is_cacheable:
        pytest.skip("the plugin cannot decode with a cache, on no device")
    ids_BT = ids().cuda()
    full_BTD, cache = run(model, ids_BT).hidden_BTD, model.new_cache(2, 9)
    parts = [run(model, ids_BT[:, a:b], cache=cache).hidden_BTD for a, b in itertools.pairwise([0, 5, 6, 7, 9])]
    assert_close(torch.cat(parts, dim=1), full_BTD)


def test_two_steps_give_the_same_bits(models: list[Transformer]) -> None:
    """Runs torch's own operations as `trainer.deterministic=true` does; ours need no switch."""
    first, second = models[1], copy.deepcopy(models[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for model in (first, second):
            output = run(model.train(), ids(8, 30).cuda())
            output.hidden_BTD.square().sum().add(sum(output.aux_losses.values())).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert p.grad is None or (q.grad is not None and torch.equal(p.grad, q.grad)), name


def test_bf16_and_autocast_are_close(models: list[Transformer]) -> None:
    expected_BTD = run(models[0], ids()).hidden_BTD
    with torch.autocast("cuda", dtype=torch.bfloat16):
        mixed = run(models[1], ids().cuda())
    mixed.hidden_BTD.float().square().sum().backward()
    low_BTD = run(models[1].to(torch.bfloat16), ids().cuda()).hidden_BTD
    for y_BTD in (mixed.hidden_BTD, low_BTD):
        # As on the CPU: another rounding may select another slot or expert.
        assert (y_BTD.cpu().float() - expected_BTD).norm() / expected_BTD.norm() < 0.2
