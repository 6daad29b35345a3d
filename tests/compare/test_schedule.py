"""Variants and runs of a comparison, from names and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pkm_lightning.compare.overrides import as_overrides
from pkm_lightning.compare.schedule import Variant, list_variants, schedule_runs, with_ladder, with_steps
from pkm_lightning.compare.settings import Settings, SweepSettings
from pkm_lightning.errors import ConfigError

SWEEP = SweepSettings(learning_rates=(0.001, 0.002), seeds=(1001,), draw=1, metric="val/loss")


def settings(**given: Any) -> Settings:
    defaults: dict[str, Any] = {"seeds": (1, 2), "jobs": 1, "variants": {}, "dense_ladder": False}
    return Settings(
        **{**defaults, "budget_tokens": None, "budget_seconds": None, "sweep": None, "warm_up": False, **given}
    )


def test_a_variant_overrides_a_named_ffn_or_names_its_own() -> None:
    own = {"moe": {"ffn.top_k": 2}, "deep": {"ffn": "dense", "model.n_layers": 6}}
    variants = list_variants(["dense", "moe"], settings(variants=own))
    assert variants == [
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
def test_a_variant_that_cannot_work_is_refused(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_variants(["dense"], settings(variants=variants))


def test_a_variant_with_its_own_learning_rate_and_a_sweep_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"variants.dense sets optim.lr"):
        list_variants(["dense"], settings(variants={"dense": {"optim.lr": 0.1}}, sweep=SWEEP))


def test_the_ladder_takes_the_place_of_dense_with_its_overrides() -> None:
    rungs = with_ladder([Variant("moe", ("ffn=moe",)), Variant("dense", ("ffn=dense", "ffn.activation=gelu"))], 1000)
    assert [rung.name for rung in rungs] == ["dense_0.5x", "dense_1x", "dense_2x", "dense_4x", "dense_8x", "moe"]
    assert rungs[0].overrides == ("ffn=dense", "ffn.activation=gelu", "match=flops", "match_budget=500")
    assert rungs[4].overrides[-1] == "match_budget=8000"


def test_the_ladder_refuses_a_variant_of_its_name() -> None:
    with pytest.raises(ConfigError, match="dense_2x"):
        with_ladder([Variant("dense_2x", ("ffn=moe",))], 1000)


def test_the_ladder_consists_of_dense_models_only() -> None:
    with pytest.raises(ConfigError, match=r"variants\.dense has ffn=moe"):
        with_ladder([Variant("dense", ("ffn=moe",))], 1000)


def test_runs_go_seed_by_seed_with_the_chosen_rates() -> None:
    variants = [Variant("a", ("ffn=dense",)), Variant("b", ("ffn=moe",))]
    runs = schedule_runs(variants, settings(), ["match=flops"], Path("out"), {"a": 0.5})
    assert [(run.variant, run.seed) for run in runs] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert runs[0].overrides == ("match=flops", "ffn=dense", "optim.lr=0.5", "seed=1")
    assert runs[1].overrides == ("match=flops", "ffn=moe", "seed=1")
    assert runs[3].folder == Path("out/runs/b/seed-2")


def test_steps_set_validations_unless_the_user_did() -> None:
    steps = "trainer.max_steps=105"
    assert with_steps(Variant("a", ()), 105, 10, 1).overrides == (steps, "trainer.val_check_interval=10")
    assert with_steps(Variant("a", ()), 105, 10, 8).overrides == (steps, "trainer.val_check_interval=80")
    assert with_steps(Variant("a", ()), 105, None, 8).overrides == (steps,)


@pytest.mark.parametrize(
    "value", [1, 2.5, True, None, "moe", "a b", "it's", "c:\\x", "x\\", "\\'", "null", [1, "x y"], {"k": 2}, "1"]
)
def test_hydra_reads_back_the_same_values(value: Any) -> None:
    (text,) = as_overrides({"key": value})
    assert OverridesParser.create().parse_override(text).value() == value
