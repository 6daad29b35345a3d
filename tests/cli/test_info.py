"""`info` prints what a configuration costs, and allocates nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small import Run, resolved

from pkm_lightning.errors import ConfigError

PRESETS = {"134m": 134e6, "373m": 373e6, "720m": 720e6, "1.3b": 1.3e9, "8b": 8.03e9}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_large_as_their_names_say(preset: str) -> None:
    run = resolved("ffn=dense", f"model={preset}")
    assert run.cost.params_total == pytest.approx(PRESETS[preset], rel=0.05)


def test_the_table_and_the_json_agree(cli: Run, tmp_path: Path) -> None:
    figures = json.loads(cli("info", "format=json").out)
    shown = cli("info").out
    assert f"{figures['params']['total']:,} / {figures['params']['active']:,}" in shown
    assert f"{figures['flops_per_token']['train']:,}" in shown
    assert f"{figures['bytes_per_token']['decode']:,}" in shown
    assert figures["table"] == {"rows": 65536, "dim": 64, "bytes": 65536 * 64 * 4}
    assert figures["optimizer_bytes"] == 2 * figures["weight_bytes"] == 8 * figures["params"]["total"]
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_64_billion_values_is_described_at_once() -> None:
    run = resolved("model=8b", "ffn.n_keys=4096")
    assert run.cost.table_params == 4096**2 * 4096


@pytest.mark.slow
def test_variants_stand_side_by_side_at_equal_budget(cli: Run, tmp_path: Path) -> None:
    names = ["dense", "moe", "pkm", "memory_plus", "peer"]
    shown = cli("info", f"ffn={','.join(names)}", "match=flops", "format=json")
    assert shown.code == 0, shown.err
    figures = json.loads(shown.out)
    assert [f["variant"] for f in figures] == names
    trunks = [f["flops_per_token"]["trunk"]["train"] for f in figures]
    assert trunks == pytest.approx([trunks[0]] * len(names), rel=0.02)
    assert [f["layers"] for f in figures] == [[0, 1], [0, 1], [1], [0, 1], [1]]
    for name, figure in zip(names, figures, strict=True):
        alone = json.loads(cli("info", f"ffn={name}", "match=flops", "format=json").out)
        assert {"variant": name, **alone} == figure
    table = cli("info", f"ffn={','.join(names)}", "match=flops").out
    assert all(name in table.splitlines()[2] for name in names)
    assert f"{trunks[0]:,}" in table
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_every_variant(cli: Run) -> None:
    shown = cli("info", "ffn=memory,memory_plus", "model.memory.n_keys=32", "placement=all", "format=json")
    assert [f["table"]["rows"] for f in json.loads(shown.out)] == [1024, 1024]
    assert [f["layers"] for f in json.loads(shown.out)] == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_a_dense_model_is_sized_in_all_its_layers(cli: Run) -> None:
    shown = cli("info", "ffn=dense,moe", "model=134m", "match=flops", "match_budget=4e8", "format=json")
    assert [f["layers"] for f in json.loads(shown.out)] == [list(range(12))] * 2


def test_variants_are_found_on_the_search_path(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "ffn").mkdir(parents=True)
    (tmp_path / "mine" / "ffn" / "narrow.yaml").write_text("_target_: pkm_lightning.ffn.Dense\nhidden_dim: 16\n")
    for where in ("--config-dir=mine", f"hydra.searchpath=[file://{tmp_path}/mine]"):
        shown = cli("info", "ffn=dense,narrow", "format=json", where)
        assert shown.code == 0, shown.err
        assert [f["ffn"] for f in json.loads(shown.out)] == ["Dense", "Dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ffn=dense,moo"], r"ffn=moo is not known; allowed: .*dense, .*memory_plus.* Did you mean 'moe'\?"),
        (["ffn=dense,dense"], r"ffn=dense,dense repeats a variant or leaves a name empty"),
        (["ffn=dense,"], r"ffn=dense, repeats a variant or leaves a name empty"),
        (
            ["ffn=dense,pkm", "match=params", "match_budget=1000"],
            r"ffn=dense: match=params through ffn.hidden_dim: even",
        ),
        (["ffn=dense,pkm", "ffn.n_keys=8"], r"ffn.n_keys is not a key of the configuration"),
        (["ffn=dense", "match=flops", "match_budget=lots"], r"match_budget='lots' is not a number"),
        (
            ["ffn=dense,pkm", "ffn=moe"],
            r"ffn=dense,pkm and ffn=moe name the FFN more than once; set one ffn=NAME,NAME,...",
        ),
    ],
)
def test_variants_that_cannot_be_shown(cli: Run, arguments: list[str], message: str) -> None:
    shown = cli("info", *arguments)
    assert shown.code == 2
    assert re.match(f"error: {message}", shown.err), shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["match=flops", "match_budget=0"], r"match_budget=0 is out of range"),
        (["match=flops", "match_budget=nan"], r"match_budget=nan is not finite; give a number"),
        (["ffn=memory", "ffn.qk_norm=maybe"], r"ffn.qk_norm='maybe' is neither true nor false; set ffn.qk_norm=true"),
        (["ffn.qk_norm=1"], r"ffn.qk_norm=1 is neither true nor false"),
        (["ffn.temperature=2"], r"ffn.temperature=2 is neither true nor false"),
        (["ffn.value_projection=x"], r"ffn.value_projection='x' is neither true nor false"),
        (["ffn.cures=5"], r"ffn.cures=5 is not a mapping"),
        (["ffn.cures.balance_loss=nan"], r"ffn.cures.balance_loss=nan is not finite"),
        (["ffn=moe_expert_choice", "ffn.capacity_factor=nan"], r"ffn.capacity_factor=nan is not finite"),
        (["ffn=moe_expert_choice", "ffn.capacity_factor=0"], r"ffn.capacity_factor=0"),
        (["ffn=moe", "ffn.top_k=65"], r"ffn.top_k=65 is out of range; allowed: 1 to 64\."),
        (["ffn=ultramem", "ffn.rank=300"], r"ffn.rank=300 is above the number of keys, ffn.n_keys=256"),
        (["ffn=ultramem", "ffn.expansion=3"], r"ffn.expansion=3 does not divide the 65536 slots"),
        (["ffn=dense", "ffn._size_by_=hidden_dim", "match=flops"], r"ffn._size_by_='hidden_dim' is not a mapping"),
        (
            ["ffn=dense", "ffn._size_by_.flops=hiden_dim", "match=flops"],
            r"ffn._size_by_.flops=hiden_dim is not a key of ffn",
        ),
        (["ffn=dense", "+ffn._step_={hidden_dim: two}", "match=flops"], r"ffn._step_.hidden_dim='two' is not a number"),
        (["ffn=dense", "+ffn._step_={hidden_dim: 0}", "match=flops"], r"ffn._step_.hidden_dim=0 is out of range"),
        (
            ["ffn=moe", "placement=middle", "placement.count=0", "match=flops", "match_budget=5e5"],
            r"match=flops through ffn.hidden_dim: the knob changes nothing, 230,400 up to its value",
        ),
    ],
)
def test_values_that_no_figure_can_be_given_for(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolved(*overrides)
