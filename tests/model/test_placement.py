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
from pkm_lightning.model.plugin_outputs import ParallelFFN, plugin_entries


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
        (4, {"count": -1}, r"placement.count=-1 is out of range; allowed: 0 or more"),
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
        ({"mode": "beside"}, r"placement.mode='beside' is not known; allowed: replace, parallel, before, after"),
        ({"mode": "before", "write_after": 1}, r"placement.write_after=1 is not offered under placement.mode=before"),
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
    variant, delay, ids_BT = Constant(0.5), where.delay(n_layers), token_ids()
    more: dict[str, Any] = {where.mode: {layer: variant}} if where.mode in ("before", "after") else {}
    if where.mode == "replace":
        ffns[layer] = variant
    elif where.mode == "parallel":
        ffns[layer] = ParallelFFN(ffns[layer], variant, defer=delay > 0)
    model = transformer(ffns, write_after=delay, **more)
    stream = residual_stream(model, ids_BT)
    added = [x_BTD - model.embedding(ids_BT) for x_BTD in stream]
    for x_BTD in added:
        assert_close(x_BTD, x_BTD.flatten()[0].expand_as(x_BTD))
    return [round(x_BTD.flatten()[0].item(), 3) for x_BTD in added]


def test_replace() -> None:
    assert added_to_embedding(placement(), 3, layer=1) == [0, 1, 1.5, 101.5]


@pytest.mark.parametrize(("mode", "expected"), [("before", [0, 1.5, 11.5, 111.5]), ("after", [0, 1, 11.5, 111.5])])
def test_before_and_after_keep_the_ffn(mode: str, expected: list[float]) -> None:
    assert added_to_embedding(placement(mode=mode), 3, layer=1) == expected


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_plugin_that_normalises_gets_the_stream_itself(place: str, normalises: bool) -> None:
    plugin, seen = Constant(0.0), []
    plugin.normalises_input = normalises  # type: ignore[assignment]
    plugin.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model = transformer([Constant(1.0)], **{place: {0: plugin}})
    model.embedding.weight.data.mul_(7)
    (stream_BTD, *_), norm = residual_stream(model, token_ids()), model.blocks[0].ffn_norm
    if place == "after":
        stream_BTD = stream_BTD + 1
    assert_close(seen[0], stream_BTD if normalises else norm(stream_BTD))
    assert len(model.blocks[0].norms()) == (2 if normalises else 3)


def test_parallel_adds_to_the_base() -> None:
    assert added_to_embedding(placement(mode="parallel"), 3, layer=1) == [0, 1, 11.5, 111.5]


def test_write_after_adds_the_output_after_a_later_layer() -> None:
    deferred = placement(mode="parallel", write_after=2)
    assert added_to_embedding(deferred, 4, layer=0) == [0, 1, 11, 111.5, 1111.5]
    assert added_to_embedding(deferred, 4, layer=1) == [0, 1, 11, 111, 1111.5]


def test_parallel_reports_both_and_sums_losses_of_one_name() -> None:
    x_BTD, context = torch.randn(2, 3, 8), FFNContext(token_ids(2, 3), observe=True)
    base, variant = Reporter(dim=8, aux_weight=1.0), Reporter(dim=8, aux_weight=3.0)
    output: FFNOutput = ParallelFFN(base, variant, defer=False)(x_BTD, context)
    parts = [base(x_BTD, context), variant(x_BTD, context)]
    assert_close(output.y_BTD, parts[0].y_BTD + parts[1].y_BTD)
    assert_close(output.aux_losses["toy"], parts[0].aux_losses["toy"] + parts[1].aux_losses["toy"])
    names = parts[0].trace.keys()
    assert output.trace.keys() == {f"{which}.{name}" for which in ("base", "variant") for name in names}
    assert output.step_stats.keys() == {"base.tokens", "base.ids", "variant.tokens", "variant.ids"}


def test_every_plugin_of_a_layer_has_entries_and_losses_of_its_own() -> None:
    plugins = {name: Reporter(dim=16, aux_weight=float(len(name))) for name in ("before", "ffn", "after")}
    losses: list[Tensor] = []
    for plugin in plugins.values():
        plugin.register_forward_hook(lambda _, inputs, output: losses.append(output.aux_losses["toy"]))
    model = transformer([plugins["ffn"]], before={0: plugins["before"]}, after={0: plugins["after"]})
    output = model(token_ids(2, 3), observe=True)
    assert {name: plugin for _, name, plugin in model.plugins()} == plugins
    for name in plugins:
        assert plugin_entries(name, output.traces[0]).keys() == {"tokens"}
        assert plugin_entries(name, output.step_stats[0]).keys() == {"tokens", "ids"}
    assert len(losses) == 3
    assert_close(output.aux_losses["toy"], torch.stack(losses).sum())
