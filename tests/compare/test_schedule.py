"""Arms and runs of a comparison, from names and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pkm_lightning.compare.overrides import as_overrides, last_of_each
from pkm_lightning.compare.schedule import Variant, list_variants, schedule_runs, with_ladder, with_steps
from pkm_lightning.compare.settings import Settings, SweepSettings
from pkm_lightning.compare.sweep import schedule_sweep
from pkm_lightning.errors import ConfigError

SWEEP = SweepSettings(learning_rates=(0.001, 0.002), seeds=(1001,), data_seed=1000, metric="test/loss")


def settings(**given: Any) -> Settings:
    defaults: dict[str, Any] = {"seeds": (1, 2), "jobs": 1, "variants": {}, "dense_ladder": False}
    return Settings(
        **{**defaults, "budget_tokens": None, "budget_seconds": None, "sweep": None, "warm_up": False, **given}
    )


def test_a_variant_overrides_a_named_ffn_or_brings_its_own() -> None:
    variants = {"moe": {"ffn.top_k": 2}, "deep": {"ffn": "dense", "model.n_layers": 6}}
    arms = list_variants(["dense", "moe"], settings(variants=variants))
    assert arms == [
        Variant("dense", ("ffn=dense",)),
        Variant("moe", ("ffn=moe", "ffn.top_k=2")),
        Variant("deep", ("ffn=dense", "model.n_layers=6")),
    ]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"mystery": {"ffn.top_k": 2}}, "variants.mystery names no FFN"),
        ({"dense": {"ffn": "moe"}}, "ffn= names dense already"),
        ({"dense": {"seed": 3}}, "variants.dense.seed: compare sets seed of each run itself; set seeds="),
        ({"dense": {"run_dir": "x"}}, "variants.dense.run_dir: compare sets run_dir of each run itself; set out="),
    ],
)
def test_a_variant_that_means_nothing_is_refused(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_variants(["dense"], settings(variants=variants))


def test_a_variant_with_its_own_learning_rate_and_a_sweep_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"variants.dense sets optim.lr"):
        list_variants(["dense"], settings(variants={"dense": {"optim.lr": 0.1}}, sweep=SWEEP))


def test_the_ladder_takes_the_place_of_dense_with_its_overrides() -> None:
    arms = with_ladder([Variant("moe", ("ffn=moe",)), Variant("dense", ("ffn=dense", "ffn.activation=gelu"))], 1000)
    assert [arm.name for arm in arms] == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x", "moe"]
    assert arms[0].overrides == ("ffn=dense", "ffn.activation=gelu", "match=flops", "match_budget=500")
    assert arms[3].overrides[-1] == "match_budget=4000"


def test_the_ladder_refuses_a_variant_of_its_name() -> None:
    with pytest.raises(ConfigError, match="dense_2x"):
        with_ladder([Variant("dense_2x", ("ffn=moe",))], 1000)


def test_the_ladder_is_of_dense_models_alone() -> None:
    with pytest.raises(ConfigError, match=r"variants\.dense has ffn=moe"):
        with_ladder([Variant("dense", ("ffn=moe",))], 1000)


def test_runs_go_seed_by_seed_with_the_chosen_rates() -> None:
    arms = [Variant("a", ("ffn=dense",)), Variant("b", ("ffn=moe",))]
    runs = schedule_runs(arms, settings(), ["match=flops"], Path("out"), {"a": 0.5})
    assert [(run.variant, run.seed) for run in runs] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert runs[0].overrides == ("match=flops", "ffn=dense", "optim.lr=0.5", "seed=1")
    assert runs[1].overrides == ("match=flops", "ffn=moe", "seed=1")
    assert runs[3].folder == Path("out/runs/b/seed-2")


def test_a_sweep_gives_every_arm_the_same_rates_seeds_and_other_facts() -> None:
    arms = [Variant("a", ("ffn=dense",)), Variant("b", ("ffn=moe",))]
    runs = schedule_sweep(arms, SWEEP, ["data.seed=5"], Path("out"), {"a": 5, "b": 5})
    assert {(run.variant, run.learning_rate, run.seed) for run in runs} == {
        (arm, rate, 1001) for arm in ("a", "b") for rate in (0.001, 0.002)
    }
    assert all("data.seed=1005" in run.overrides and "data.seed=5" not in run.overrides for run in runs)
    assert len({run.folder for run in runs}) == len(runs) == len({run.label for run in runs})


def test_data_without_a_seed_are_swept_as_they_are() -> None:
    (first, *_) = schedule_sweep([Variant("a", ("ffn=dense",))], SWEEP, [], Path("out"), {})
    assert not any(override.startswith("data.seed") for override in first.overrides)


def test_of_two_overrides_of_a_key_the_later_one_stays() -> None:
    assert last_of_each(["placement=all", "+x=1", "placement=middle", "x=2"]) == ("placement=middle", "x=2")


def test_steps_bring_validations_unless_they_were_said() -> None:
    steps = "trainer.max_steps=105"
    assert with_steps(Variant("a", ()), 105, 10, 1).overrides == (steps, "trainer.val_check_interval=10")
    assert with_steps(Variant("a", ()), 105, 10, 8).overrides == (steps, "trainer.val_check_interval=80")
    assert with_steps(Variant("a", ()), 105, None, 8).overrides == (steps,)


@pytest.mark.parametrize(
    "value", [1, 2.5, True, None, "moe", "a b", "it's", "c:\\x", "x\\", "\\'", "null", [1, "x y"], {"k": 2}, "1"]
)
def test_values_survive_hydras_grammar(value: Any) -> None:
    (text,) = as_overrides({"key": value})
    assert OverridesParser.create().parse_override(text).value() == value
