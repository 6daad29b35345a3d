"""The plugin's knob is solved so that FLOPs or parameters match a budget to 2%, or an error names what stops it."""

from __future__ import annotations

from typing import Any

import pytest
from toys import config

from pkm_lightning.build.model import build_meta_model
from pkm_lightning.build.sizing import _closest, solve_size
from pkm_lightning.errors import ConfigError
from pkm_lightning.model import ModelCost, model_cost


def cost(settings: dict[str, Any]) -> ModelCost:
    return model_cost(build_meta_model(settings), settings["data"]["seq_len"])


@pytest.mark.parametrize(
    "overrides",
    [
        ("ffn=memory_plus", "match=flops"),
        ("ffn=memory_plus", "match=flops", "placement.mode=parallel", "match_budget=6e5"),
        pytest.param(
            ("ffn=memory_plus", "match=flops", "match_budget=5e5", "table.shared=false"), marks=pytest.mark.slow
        ),
        pytest.param(("ffn=dense", "match=flops", "match_budget=4e5"), marks=pytest.mark.slow),
        pytest.param(("ffn=memory_plus", "match=params"), marks=pytest.mark.slow),
        pytest.param(("ffn=memory_plus", "match=params", "match_budget=2e6"), marks=pytest.mark.slow),
        ("ffn=memory_plus", "match=params", "match_budget=5e8", "model.dim=72"),
        pytest.param(("ffn=dense", "match=params", "match_budget=1e6"), marks=pytest.mark.slow),
        ("ffn=dense", "match=params"),
        ("ffn=moe", "match=flops"),
        pytest.param(("ffn=moe", "match=params", "match_budget=2e6"), marks=pytest.mark.slow),
        pytest.param(("ffn=moe_expert_choice", "match=flops"), marks=pytest.mark.slow),
        pytest.param(("ffn=moe_expert_choice", "match=params", "match_budget=3e6"), marks=pytest.mark.slow),
        pytest.param(("ffn=pkm", "match=flops"), marks=pytest.mark.slow),
        pytest.param(("ffn=pkm", "match=params", "match_budget=3e6"), marks=pytest.mark.slow),
        pytest.param(("ffn=memory", "match=flops"), marks=pytest.mark.slow),
        pytest.param(("ffn=memory", "match=params", "match_budget=3e6"), marks=pytest.mark.slow),
        pytest.param(("ffn=peer", "match=flops"), marks=pytest.mark.slow),
        ("ffn=peer", "match=params", "match_budget=3e6"),
        ("ffn=ultramem", "match=flops"),
        ("ffn=ple", "match=flops"),
        pytest.param(("ffn=ple", "match=params"), marks=pytest.mark.slow),
        pytest.param(("ffn=stem", "match=flops"), marks=pytest.mark.slow),
        ("ffn=stem", "match=params"),
        pytest.param(("ffn=ultramem", "match=params", "match_budget=3e6"), marks=pytest.mark.slow),
        pytest.param(("ffn=ultramem_v2", "match=flops"), marks=pytest.mark.slow),
        pytest.param(("ffn=ultramem_v2", "match=params", "match_budget=3e6"), marks=pytest.mark.slow),
    ],
)
def test_matches_within_two_percent(overrides: tuple[str, ...]) -> None:
    settings = config(*overrides)
    solved = solve_size(settings)
    knob = settings["ffn"]["_size_by_"][settings["match"]]
    basis = "trunk_train_flops" if settings["match"] == "flops" else "params_total"
    twin = config("ffn=dense", *(o for o in overrides if o.startswith("model.")))
    budget = settings["match_budget"] or getattr(cost(twin), basis)
    assert getattr(cost(solved), basis) == pytest.approx(budget, rel=0.02)
    # Nothing else has changed, and the given configuration not at all.
    *parents, leaf = knob.split(".") if "." in knob else ("ffn", knob)
    before, after = settings, solved
    for parent in parents:
        before, after = before[parent], after[parent]
    after[leaf] = before[leaf]
    assert solved == settings == config(*overrides)


def test_the_nearest_value_is_taken() -> None:
    settings = config("ffn=dense", "match=params", "match_budget=1e6")
    solved = solve_size(settings)
    best = abs(cost(solved).params_total - 1e6)
    for step in (-1, 1):
        other = {**solved, "ffn": {**solved["ffn"], "hidden_dim": solved["ffn"]["hidden_dim"] + step}}
        assert abs(cost(other).params_total - 1e6) >= best


def test_match_none_changes_nothing() -> None:
    assert solve_size(config()) == config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("match=flop",), r"match='flop' is not known; allowed: none, flops, params\. Did you mean 'flops'\?"),
        (("match=params", "match_budget=1000"), r"match=params through ffn.n_keys: even its least value 6 gives "),
        (("match=flops", "match_budget=10"), r"match=flops through ffn.value_dim: even its least value 1 gives "),
        (("match=params", "match_budget=1e15"), r"ffn.n_keys: the nearest value 46340 gives .* set match_budget"),
        (("ffn=custom", "ffn._target_=toys.Constant", "match=flops"), r"toys.Constant names no knob .* _size_by_"),
        (
            (
                "ffn=custom",
                "ffn._target_=toys.Reporter",
                "+ffn.aux_weight=1",
                "+ffn._size_by_={flops: aux_weight}",
                "match=flops",
            ),
            r"match=flops: Reporter states no cost\(\); set match=params or match=none",
        ),
    ],
)
def test_errors_name_the_bound(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_size(config(*overrides))


def test_a_budget_is_met_within_two_percent() -> None:
    def measure(value: int) -> float:
        return 1000.0 * value

    assert _closest(measure, 10_190, "match=params", 1) == 10
    assert _closest(measure, 26_470, "match=params", 1) == 26
    for budget in (10_210, 10_300):
        with pytest.raises(ConfigError, match="not within 2% of the budget"):
            _closest(measure, budget, "match=params", 1)
