"""The keys of compare: what is allowed, and one sentence for what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.compare.settings import COMPARE_KEYS, read_report_settings, read_settings
from pkm_lightning.errors import ConfigError


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        composed = compose("compare", overrides=["run_dir=somewhere", *overrides])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    return dict(plain)


def test_the_defaults_are_three_seeds_one_at_a_time() -> None:
    settings = read_settings(config())
    assert (settings.seeds, settings.jobs, settings.sweep) == ((1, 2, 3), 1, None)
    assert (settings.variants, settings.dense_ladder) == ({}, False)
    assert read_report_settings(config()).metric == "auto"
    assert read_report_settings(config("report.metric=test/recall_seen")).metric == "recall_seen"
    assert read_settings(config("lr_sweep=[1e-3,2e-3]", "sweep=null")).sweep is not None


def test_compare_adds_just_its_own_keys_to_those_of_a_run() -> None:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        run = compose("config", overrides=["run_dir=somewhere"])
    assert set(config()) - set(run) == set(COMPARE_KEYS)


def test_what_null_means_is_what_the_yaml_says() -> None:
    given = config("lr_sweep=[1e-3,2e-3]")
    assert read_settings(given) == read_settings({**given, "sweep": None})
    assert read_report_settings(given) == read_report_settings({**given, "report": None})


def test_seeds_may_be_listed_and_a_sweep_has_its_own() -> None:
    settings = read_settings(config("seeds=[7,9]", "lr_sweep=[2e-3,1e-3]", "sweep.seeds=2"))
    assert settings.seeds == (7, 9)
    assert settings.sweep is not None
    assert (settings.sweep.learning_rates, settings.sweep.seeds) == ((0.001, 0.002), (1001, 1002))


def test_overrides_of_a_variant_may_be_dotted_or_nested() -> None:
    dotted = read_settings(config("+variants.big={ffn: moe, ffn.top_k: 2}")).variants
    assert dotted == {"big": {"ffn": "moe", "ffn.top_k": 2}}
    assert read_settings(config("+variants.moe.ffn.top_k=2")).variants == {"moe": {"ffn.top_k": 2}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=0"], "seeds=0 is out of range; allowed: 1 to"),
        (["seeds=[]"], r"seeds=\[\] leaves nothing to run"),
        (["seeds=[1,1]"], "names a seed twice"),
        (["seeds=1.5"], "seeds=1.5 is no whole number"),
        (["jobs=0"], "jobs=0 is out of range"),
        (["dense_ladder=maybe"], "dense_ladder='maybe' is neither true nor false"),
        (["budget.tokens=1e6", "budget.seconds=60"], "exclude each other"),
        (["budget.tokens=-1"], "budget.tokens=-1 is out of range"),
        (["budget.seconds=60", "jobs=2"], r"budget.seconds=60 with jobs=2: .* set jobs=1"),
        (["budget=3"], "budget=3 is no mapping"),
        (["+budget.hours=3"], "budget.hours is not known; allowed: tokens, seconds"),
        (["lr_sweep=[1e-3]"], "no list of two or more"),
        (["lr_sweep=[1e-3,1e-3]"], "no list of two or more"),
        (["lr_sweep=[[1],[2]]"], "is no number"),
        (["lr_sweep=[1e-3,2e-3]", "sweep.metric=test/lost"], "sweep.metric=test/lost is no figure"),
        (["warm_up=maybe"], "warm_up='maybe' is neither"),
        (["lr_sweep=[1e-3,-1]"], "lr_sweep=-1 is out of range"),
        (["lr_sweep=[1e-3,2e-3]", "sweep.first_seed=2"], "seed 2 is of the sweep and of the reported runs"),
        (["+variants={a b: {ffn: moe}}"], "letters, digits"),
        (["+variants.moe=3"], "variants.moe=3 is no mapping"),
        (["~budget"], "budget was taken out of the configuration"),
    ],
)
def test_what_cannot_work_is_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(config(*overrides))


@pytest.mark.parametrize(
    "override", ["report.resamples=3", "report.seed=-1", "+report.colour=red", "report.metric=recal"]
)
def test_report_settings_are_checked(override: str) -> None:
    with pytest.raises(ConfigError, match=r"report\."):
        read_report_settings(config(override))
