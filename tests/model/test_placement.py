"""The layers of the variant, and the residual stream under replace, parallel and write_after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from toys import Constant, Reporter, token_ids, transformer

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.model import Placement, Transformer


def placement(**changes: Any) -> Placement:
    return Placement(
        **{"layers": "centred", "count": 3, "stride": None, "mode": "replace", "write_after": 0, **changes}
    )


SPREAD: dict[str, Any] = {"layers": "spread", "count": None, "mode": "parallel", "write_after": None}


@pytest.mark.parametrize(
    ("n_layers", "changes", "expected"),
    [
        (24, {}, [4, 12, 20]),
        (12, {}, [2, 6, 10]),
        (3, {}, [0, 1, 2]),
        (24, {"stride": 4}, [8, 12, 16]),
        (24, {"count": 1}, [12]),
        (24, {"count": 0}, []),
        (2, {"count": 3}, [0, 1]),
        (5, {"count": 2}, [0, 2]),
        (4, {"layers": "all"}, [0, 1, 2, 3]),
        (9, {"layers": [7, 0, 3]}, [0, 3, 7]),
        (9, {"layers": []}, []),
        (9, {"layers": [6], "mode": "parallel", "write_after": 2}, [6]),
        (24, {"count": None}, [4, 12, 20]),
        (32, SPREAD, [2, 7, 12, 17, 22, 27]),
        (2, SPREAD, [0]),
        (1, SPREAD, [0]),
        (7, {**SPREAD, "count": 3, "write_after": 0}, [2, 4, 6]),
        (6, {**SPREAD, "count": 2, "stride": 2}, [2, 4]),
    ],
)
def test_resolves(n_layers: int, changes: dict[str, Any], expected: list[int]) -> None:
    assert placement(**changes).resolve(n_layers) == expected


def test_spread_writes_just_before_the_next_one_reads() -> None:
    assert placement(**SPREAD).delay(32) == 4
    assert placement(**SPREAD).delay(2) == 1
    assert placement().delay(32) == 0


@pytest.mark.parametrize(
    ("n_layers", "changes", "message"),
    [
        (4, {"layers": [1, 4]}, r"puts a layer at 4; allowed: 0 to 3 \(model.n_layers=4\)"),
        (4, {"layers": [-1]}, r"puts a layer at -1; allowed: 0 to 3"),
        (4, {"layers": [2, 2]}, r"placement.layers=\[2, 2\] repeats a layer"),
        (4, {"count": -1}, r"placement.count=-1 is out of range; allowed: 0 to inf"),
        (4, {"count": 3, "stride": 3}, r"puts a layer at -1; .*placement.stride"),
        (4, {"stride": 0}, r"placement.stride=0 is out of range"),
        (4, {"layers": "all", "mode": "parallel", "write_after": 1}, r"at 3; .*less placement.write_after=1\)"),
    ],
)
def test_resolve_refuses(n_layers: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement(**changes).resolve(n_layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "center"}, r"placement.layers='center' is not known; allowed: all, centred, spread\. Did you mean"),
        ({"mode": "beside"}, r"placement.mode='beside' is not known; allowed: replace, parallel"),
        ({"write_after": 1}, r"placement.write_after=1 leaves the reading layer without any FFN"),
        ({"layers": "spread", "write_after": None}, r"placement.write_after=null leaves the reading layer without"),
        ({"mode": "parallel", "write_after": None}, r"placement.write_after=null needs placement.layers=spread"),
        ({"mode": "parallel", "write_after": -1}, r"placement.write_after=-1 is out of range"),
    ],
)
def test_construction_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placement(**changes)


def residual_stream(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    """Returns the stream before each layer's FFN and after the last layer, without attention and final norm."""
    for block in model.blocks:
        nn.init.zeros_(block.attention.out.weight)
    model.norm = nn.Identity()
    inputs: list[Tensor] = []
    hooks = [block.ffn_norm.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for block in model.blocks]
    output = model(ids_BT)
    for hook in hooks:
        hook.remove()
    return [*inputs, output.hidden_BTD]


def added_to_embedding(where: Placement, n_layers: int, layer: int) -> list[float]:
    """Returns the stream minus the embedding, where base FFNs add 1, 10, 100... and the variant adds 0.5."""
    ffns: list[nn.Module] = [Constant(10.0**i) for i in range(n_layers)]
    ffns[layer] = where.combine(ffns[layer], Constant(0.5), defer=where.delay(n_layers) > 0)
    ids_BT = token_ids()
    model = transformer(ffns, write_after=where.delay(n_layers))
    stream = residual_stream(model, ids_BT)
    added = [x_BTD - model.embedding(ids_BT) for x_BTD in stream]
    for x_BTD in added:
        assert_close(x_BTD, x_BTD.flatten()[0].expand_as(x_BTD))
    return [round(x_BTD.flatten()[0].item(), 3) for x_BTD in added]


def test_replace() -> None:
    assert added_to_embedding(placement(), 3, layer=1) == [0, 1, 1.5, 101.5]


def test_parallel_adds_to_the_base() -> None:
    assert added_to_embedding(placement(mode="parallel"), 3, layer=1) == [0, 1, 11.5, 111.5]


def test_write_after_adds_the_output_after_a_later_layer() -> None:
    deferred = placement(mode="parallel", write_after=2)
    assert added_to_embedding(deferred, 4, layer=0) == [0, 1, 11, 111.5, 1111.5]
    assert added_to_embedding(deferred, 4, layer=1) == [0, 1, 11, 111, 1111.5]


def test_parallel_reports_both_and_sums_losses_of_one_name() -> None:
    x_BTD, context = torch.randn(2, 3, 8), FFNContext(token_ids(2, 3), observe=True)
    base, variant = Reporter(dim=8, aux_weight=1.0), Reporter(dim=8, aux_weight=3.0)
    output: FFNOutput = placement(mode="parallel").combine(base, variant, defer=False)(x_BTD, context)
    parts = [base(x_BTD, context), variant(x_BTD, context)]
    assert_close(output.y_BTD, parts[0].y_BTD + parts[1].y_BTD)
    assert_close(output.aux_losses["toy"], parts[0].aux_losses["toy"] + parts[1].aux_losses["toy"])
    names = parts[0].trace.keys()
    assert output.trace.keys() == {f"{which}.{name}" for which in ("base", "variant") for name in names}
    assert output.step_stats.keys() == {"base.tokens", "base.ids", "variant.tokens", "variant.ids"}
