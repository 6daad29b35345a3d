"""The keys of compare: what is allowed, and one sentence for what is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pkm_lightning.compare.settings import COMPARE_KEYS, read_report_settings, read_settings
from pkm_lightning.errors import ConfigError

RATES = {"lr_sweep": [1e-3, 2e-3]}


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module(version_base="1.3", config_module="pkm_lightning.configs"):
        plain: Any = OmegaConf.to_container(compose(name, overrides=["run_dir=somewhere", *overrides]), resolve=True)
    return dict(plain)


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """Returns the composed defaults, which tests must not change."""
    return composed("compare")


def changed(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `config` with dotted keys set."""
    result = copy.deepcopy(config)
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (result[group] if group else result)[name] = value
    return result


def test_the_defaults_are_three_seeds_one_at_a_time(defaults: dict[str, Any]) -> None:
    settings = read_settings(defaults)
    assert (settings.seeds, settings.jobs, settings.sweep) == ((1, 2, 3), 1, None)
    assert (settings.variants, settings.dense_ladder) == ({}, False)
    assert read_report_settings(defaults).metric == "auto"
    assert read_report_settings(changed(defaults, {"report.metric": "test/recall_seen"})).metric == "recall_seen"


def test_compare_adds_just_its_own_keys_to_those_of_a_run(defaults: dict[str, Any]) -> None:
    assert set(defaults) - set(composed("config")) == set(COMPARE_KEYS)


def test_null_means_the_defaults_of_the_yaml(defaults: dict[str, Any]) -> None:
    with_sweep = changed(defaults, RATES)
    assert read_settings(with_sweep).sweep is not None
    assert read_settings(with_sweep) == read_settings({**with_sweep, "sweep": None})
    assert read_report_settings(with_sweep) == read_report_settings({**with_sweep, "report": None})


def test_seeds_may_be_listed_and_a_sweep_has_its_own(defaults: dict[str, Any]) -> None:
    settings = read_settings(changed(defaults, {"seeds": [7, 9], "lr_sweep": [2e-3, 1e-3], "sweep.seeds": 2}))
    assert settings.seeds == (7, 9)
    assert settings.sweep is not None
    assert (settings.sweep.learning_rates, settings.sweep.seeds) == ((0.001, 0.002), (1001, 1002))


def test_overrides_of_a_variant_may_be_dotted_or_nested() -> None:
    variants = ["+variants.big={ffn: moe, ffn.top_k: 2}", "+variants.moe.ffn.top_k=2"]
    assert read_settings(composed("compare", *variants)).variants == {
        "big": {"ffn": "moe", "ffn.top_k": 2},
        "moe": {"ffn.top_k": 2},
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": 0}, "seeds=0 is out of range; allowed: 1 to"),
        ({"seeds": []}, r"seeds=\[\] leaves nothing to run"),
        ({"seeds": [1, 1]}, "contains a seed twice"),
        ({"seeds": 1.5}, "seeds=1.5 is not a whole number"),
        ({"jobs": 0}, "jobs=0 is out of range"),
        ({"dense_ladder": "maybe"}, "dense_ladder='maybe' is neither true nor false"),
        ({"budget.tokens": 1e6, "budget.seconds": 60}, "exclude each other"),
        ({"budget.tokens": -1}, "budget.tokens=-1 is out of range"),
        ({"budget.seconds": 0}, "budget.seconds=0 is out of range"),
        ({"budget.seconds": 60, "jobs": 2}, r"budget.seconds=60 with jobs=2: .* set jobs=1"),
        ({"budget": 3}, "budget=3 is not a mapping"),
        ({"budget.hours": 3}, "budget.hours is not known; allowed: tokens, seconds"),
        ({"lr_sweep": [1e-3]}, "not a list of two or more"),
        ({"lr_sweep": [1e-3, 1e-3]}, "not a list of two or more"),
        ({"lr_sweep": [[1], [2]]}, "is not a number"),
        (
            {**RATES, "sweep.metric": "test/loss"},
            "sweep.metric=test/loss is a figure of the test.*Did you mean 'val/loss'",
        ),
        ({**RATES, "sweep.metric": "recall_question"}, "is no figure of validation;.*Did you mean val/recall_question"),
        ({**RATES, "sweep.metric": "val/mine"}, "val/mine: whether more or less of it is better is not known"),
        ({"warm_up": "maybe"}, "warm_up='maybe' is neither"),
        ({"lr_sweep": [1e-3, -1]}, "lr_sweep=-1 is out of range"),
        ({**RATES, "sweep.first_seed": 2}, "seed 2 belongs to the sweep and to the reported runs"),
        ({**RATES, "sweep.draw": -1}, "sweep.draw=-1 is out of range"),
        ({**RATES, "sweep.data_seed": 5}, "sweep.data_seed is not known; allowed: seeds, first_seed, draw, metric"),
        ({"variants": {"a b": {"ffn": "moe"}}}, "letters, digits"),
        ({"variants": {"moe": 3}}, "variants.moe=3 is not a mapping"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(defaults: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(changed(defaults, values))


def test_a_deleted_key_is_refused(defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="budget was deleted from the configuration"):
        read_settings({key: value for key, value in defaults.items() if key != "budget"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("report.resamples", 3), ("report.seed", -1), ("report.colour", "red"), ("report.metric", "recal")],
)
def test_report_settings_are_checked(defaults: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        read_report_settings(changed(defaults, {key: value}))
