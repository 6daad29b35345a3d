"""`info` prints what a configuration costs, and allocates nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small import Run, resolved

from pkm_lightning.cli.info import describe
from pkm_lightning.errors import ConfigError


def test_the_table_and_the_json_agree(cli: Run, tmp_path: Path) -> None:
    figures = json.loads(cli("info", "format=json").out)
    shown = cli("info").out
    assert f"{figures['params']['total']:,} / {figures['params']['active']:,}" in shown
    assert f"{figures['flops_per_token']['train']:,}" in shown
    assert figures["flops_per_token"]["context"] == 64
    assert re.search(r"at a context of +│ 64 tokens \(data.seq_len\)", shown)
    assert figures["model"] == {"n_layers": 2, "dim": 64}
    assert figures["remarks"] == []
    assert f"{figures['bytes_per_token']['decode']:,}" in shown
    assert figures["table"] == {"count": 1, "rows": 65536, "dim": 64, "bytes": 65536 * 64 * 4}
    assert figures["optimizer_bytes"] == 2 * figures["weight_bytes"] == 8 * figures["params"]["total"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("tokens", "flops"), [(64, 0.623e9), (4096, 1.019e9)])
def test_flops_are_those_of_the_context_that_stands_beside_them(tokens: int, flops: float) -> None:
    run = resolved("ffn=dense", "model=373m", f"data.seq_len={tokens}")
    assert describe(run)["flops_per_token"]["context"] == tokens
    assert run.cost.trunk_flops == pytest.approx(flops, rel=1e-3)


def test_a_batch_that_does_not_suit_the_model_or_the_ranks_is_remarked() -> None:
    few, uneven = describe(resolved("ffn=dense", "model=1.3b", "strategy=ddp", "devices=5"))["remarks"][::-1]
    assert few.startswith("2,048 tokens per step (data.global_batch_size=32 x data.seq_len=64) are few for this model")
    assert "would take 11,679,640 steps" in few
    assert uneven.startswith("fit would refuse this batch: data.global_batch_size=32 does not divide over 5 ranks")
    large = describe(resolved("ffn=dense", "model=1.3b", "data.seq_len=4096", "data.global_batch_size=256"))
    assert large["remarks"] == []


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


def test_an_experiment_shows_its_variants_unless_an_ffn_is_named(cli: Run) -> None:
    shown = cli("info", "experiment=paper_134m", "format=json")
    assert shown.code == 0, shown.err
    figures = json.loads(shown.out)
    assert [f["variant"] for f in figures] == ["dense", "moe", "peer", "memory", "memory_plus"]
    assert figures[-1]["layers"] == [2, 6, 10]
    alone = json.loads(cli("info", "experiment=paper_134m", "ffn=peer", "format=json").out)
    assert (alone["ffn"], alone["model"]) == ("PEER", {"n_layers": 12, "dim": 768})


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
        (
            ["ffn=dense,pkm", "match=params", "match_budget=1000"],
            r"ffn=dense: match=params through ffn.hidden_dim: even",
        ),
        (["ffn=dense,pkm", "ffn.n_keys=8"], r"ffn.n_keys is not a key of the configuration"),
        (["strategy=ddp,ddp"], r"strategy=ddp,ddp repeats a variant or leaves a name empty; allowed: strategy=NAME,"),
        (["strategy=fsdp,single", "devices=2"], r"strategy=single: trainer.devices=2 needs a strategy"),
        (["strategy=ddp,single", "devices=2", "ffn=dense,pkm"], r"dense, single: trainer.devices=2 needs a strategy"),
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
