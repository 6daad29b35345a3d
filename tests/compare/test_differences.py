"""Differences that make runs incomparable are result wherever they hide; intended differences cause no warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun, ladder
from studies import SETTINGS

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.differences import Difference, equal_seconds, find_differences, varied_keys
from pkm_lightning.compare.records import read_runs
from pkm_lightning.compare.study import make_study


def differences(root: Path, *runs: FakeRun, comparison: Comparison | None = None) -> dict[str, Difference]:
    for run in runs:
        run.write(root)
    return {d.key: d for d in find_differences(read_runs([root])[0], [comparison] if comparison else [])}


def test_a_fair_comparison_differs_in_ffn_and_seed_only(tmp_path: Path) -> None:
    result = differences(tmp_path, *ladder())
    assert {d.kind for d in result.values()} == {"ffn", "seed"}
    assert {"ffn._target_", "ffn.hidden_dim", "seed", "data.order_seed"} == set(result)


@pytest.mark.parametrize(
    ("config", "record", "key"),
    [
        ({"data": {"global_batch_size": 24}}, {}, "data.global_batch_size"),
        ({"data": {"seed": 7}}, {}, "data.seed"),
        ({"trainer": {"precision": "bf16-mixed"}}, {"precision": "bf16-mixed"}, "trainer.precision"),
        ({"optim": {"lr": 0.1}}, {}, "optim.lr"),
        ({"table": {"learning": "dense"}}, {}, "table.learning"),
        ({"trainer": {"max_steps": 200}}, {}, "trainer.max_steps"),
        ({"model": {"n_layers": 6}}, {}, "model.n_layers"),
        ({"new": {"key": 1}}, {}, "new.key"),
        ({}, {"device": "NVIDIA H200"}, "run.json: device"),
        ({}, {"threads": 2}, "run.json: threads"),
        ({}, {"commit": "c0ffee+dirty"}, "run.json: commit"),
        ({}, {"versions": {"torch": "2.11.0"}}, "run.json: versions.torch"),
        ({}, {"data": "others"}, "run.json: data"),
    ],
)
@pytest.mark.parametrize("where", ["another variant", "another seed"])
def test_a_hidden_difference_is_found(
    tmp_path: Path, config: dict[str, Any], record: dict[str, Any], key: str, where: str
) -> None:
    variant, seed, ffn = ("dense", 1, "Dense") if where == "another variant" else ("memory_plus", 2, "MemoryPlus")
    result = differences(
        tmp_path, FakeRun("memory_plus", 1), FakeRun(variant, seed, ffn=ffn, config=config, record=record)
    )
    assert result[key].kind == "other"
    assert next(iter(result)) in {d.key for d in result.values() if d.kind == "other"}


@pytest.mark.parametrize("unknown", [{"status": "running"}, {"status": "failed", "reason": "no data"}])
def test_a_value_that_a_run_has_not_recorded_yet_is_no_difference(tmp_path: Path, unknown: dict[str, Any]) -> None:
    started = FakeRun("memory_plus", 1, record={**unknown, "device": None, "world_size": None, "data": None})
    assert not [d for d in differences(tmp_path, FakeRun("memory_plus", 2), started).values() if d.kind == "other"]
    elsewhere = FakeRun("memory_plus", 3, record={**unknown, "device": "NVIDIA H200", "data": None})
    assert {d.key for d in differences(tmp_path, elsewhere).values() if d.kind == "other"} == {"run.json: device"}


def test_further_variants_are_what_is_compared_and_no_dense_reference(tmp_path: Path) -> None:
    extra = {"extra_ffns": {"engram": {"ffn": {"rows": 100}, "placement": {"layers": [1]}}}}
    mixed = FakeRun("both", 1, ffn="Dense", config={**extra, "ffn": {"_target_": "pkm_lightning.ffn.Dense"}})
    plain = FakeRun("dense", 1, ffn="Dense", config={"ffn": {"_target_": "pkm_lightning.ffn.Dense"}})
    result = differences(tmp_path, mixed, plain)
    assert result["extra_ffns.engram.ffn.rows"].kind == result["extra_ffns.engram.placement.layers"].kind == "ffn"
    runs, _ = read_runs([tmp_path])
    assert {run.variant: run.is_dense for run in runs} == {"both": False, "dense": True}


def test_within_a_variant_not_even_the_ffn_may_differ(tmp_path: Path) -> None:
    result = differences(tmp_path, FakeRun("a", 1, flops=1000), FakeRun("a", 2, flops=2000))
    assert result["ffn.hidden_dim"].kind == "other"


def test_a_data_order_that_does_not_follow_the_seed_is_other(tmp_path: Path) -> None:
    result = differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, config={"data": {"order_seed": 9}}))
    assert result["data.order_seed"].kind == "other"


def test_a_solved_key_outside_the_ffn_is_its_size(tmp_path: Path) -> None:
    solved = {"model": {"base_ffn": {"hidden_dim": 119}}, "ffn": {"_size_by_": {"flops": "model.base_ffn.hidden_dim"}}}
    other = {"model": {"base_ffn": {"hidden_dim": 172}}}
    result = differences(tmp_path, FakeRun("ultramem", 1, config=solved), FakeRun("dense", 1, config=other))
    assert result["model.base_ffn.hidden_dim"].kind == "ffn"


def test_learning_rates_of_the_sweep_are_listed_without_a_warning(tmp_path: Path) -> None:
    runs = [FakeRun("a", 1, config={"optim": {"lr": 0.003}}), FakeRun("b", 1)]
    comparison = Comparison(
        command=[], base=[], variants={"a": [], "b": []}, sweep={"chosen": {"a": 0.003, "b": 0.006}}
    )
    assert differences(tmp_path, *runs, comparison=comparison)["optim.lr"].kind == "sweep"
    comparison.sweep = {"chosen": {"a": 0.003, "b": 0.012}}
    assert differences(tmp_path / "again", *runs, comparison=comparison)["optim.lr"].kind == "other"


def test_steps_of_an_equal_time_comparison_are_its_budget(tmp_path: Path) -> None:
    runs = [FakeRun("a", 1), FakeRun("b", 1, config={"trainer": {"max_steps": 70}})]
    comparison = Comparison(command=[], base=[], variants={"a": [], "b": []}, seconds=60)
    assert differences(tmp_path, *runs, comparison=comparison)["trainer.max_steps"].kind == "budget"


def test_each_variant_of_merged_comparisons_needs_its_own_sweep_and_budget(tmp_path: Path) -> None:
    FakeRun("a", 1, config={"optim": {"lr": 0.003}}).write(tmp_path)
    FakeRun("loose", 1).write(tmp_path)
    swept = Comparison(command=[], base=[], variants={"a": []}, sweep={"chosen": {"a": 0.003}}, seconds=60)
    other = Comparison(command=[], base=[], variants={"loose": []}, seconds=120)
    runs, _ = read_runs([tmp_path])
    for comparisons in ([swept], [swept, other]):
        assert {d.key: d.kind for d in find_differences(runs, comparisons)}["optim.lr"] == "other"
    assert equal_seconds(runs, [swept]) is None
    assert equal_seconds(runs, [swept, other]) is None


def test_rates_of_sweeps_with_different_settings_are_an_unfair_difference(tmp_path: Path) -> None:
    FakeRun("a", 1, config={"optim": {"lr": 0.003}}).write(tmp_path)
    FakeRun("b", 1).write(tmp_path)
    runs, _ = read_runs([tmp_path])
    tried = {"learning_rates": [0.003, 0.006], "results": {}}
    both = [
        Comparison(
            command=[], base=[], variants={variant: []}, sweep={**tried, "seeds": [seed], "chosen": {variant: rate}}
        )
        for variant, seed, rate in (("a", 1001, 0.003), ("b", 1002, 0.006))
    ]
    assert {d.key: d.kind for d in find_differences(runs, both)}["optim.lr"] == "other"
    assert both[1].sweep is not None
    both[1].sweep["seeds"] = [1001]
    assert {d.key: d.kind for d in find_differences(runs, both)}["optim.lr"] == "sweep"


def test_a_sweep_under_other_conditions_is_reported(tmp_path: Path) -> None:
    settings = {"learning_rates": [0.003, 0.006], "seeds": [1001], "data_seed": 1000, "metric": "test/loss"}
    sweep = {**settings, "results": {}, "chosen": {"a": 0.006, "b": 0.006}}
    Comparison(command=[], base=[], variants={"a": [], "b": []}, seeds=[1], sweep=sweep).save(tmp_path)
    for variant in ("a", "b"):
        FakeRun(variant, 1).write(tmp_path / "runs")
        for rate in (0.003, 0.006):
            run = FakeRun(variant, 1001, data_seed=1000, config={"optim": {"lr": rate}})
            run.write(tmp_path / "sweep", f"{variant}/lr-{rate}/seed-1001")
    assert make_study([tmp_path], SETTINGS).unfair == []
    other = FakeRun("b", 1002, data_seed=1000, config={"trainer": {"precision": "bf16-mixed"}})
    other.write(tmp_path / "sweep", "b/lr-0.003/seed-1002")
    (difference,) = make_study([tmp_path], SETTINGS).unfair
    assert difference.key == "sweep: trainer.precision"
    assert difference.values["b"] == ("32-true", "bf16-mixed")


def test_the_place_of_caches_is_no_difference(tmp_path: Path) -> None:
    assert differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, config={"data": {"cache_dir": "/mnt/x"}})) == {}


def test_a_variant_that_was_not_matched_is_an_unfair_difference(tmp_path: Path) -> None:
    result = differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, flops=9000, config={"match": "none"}))
    assert result["match"].kind == "other"


@pytest.mark.parametrize(
    ("seed", "tokens", "is_unfair"), [(1, 995_000, False), (1, 970_000, True), (2, 970_000, False), (2, 800_000, True)]
)
def test_unequal_tokens_are_unfair(tmp_path: Path, seed: int, tokens: int, is_unfair: bool) -> None:
    """Allows slightly more between seeds, which pack sequences in different orders."""
    result = differences(tmp_path, FakeRun("a", 1), FakeRun("b", seed, record={"tokens": tokens}))
    assert ("run.json: tokens" in result) is is_unfair


@pytest.mark.parametrize(("seconds", "is_unfair"), [(95.0, False), (60.0, True)])
def test_runs_of_equal_seconds_may_differ_in_tokens_but_not_in_seconds(
    tmp_path: Path, seconds: float, is_unfair: bool
) -> None:
    comparison = Comparison(command=[], base=[], variants={"a": [], "b": []}, seconds=100)
    runs = [FakeRun("a", 1), FakeRun("b", 1, seconds=seconds, record={"tokens": 300})]
    result = differences(tmp_path, *runs, comparison=comparison)
    assert ("run.json: seconds_train" in result) is is_unfair
    assert "run.json: tokens" not in result


def test_a_difference_names_the_variants_that_set_it(tmp_path: Path) -> None:
    runs = [FakeRun("a", 1), FakeRun("deep", 1, config={"model": {"n_layers": 6}})]
    comparison = Comparison(command=[], base=[], variants={"a": [], "deep": ["ffn=dense", "model.n_layers=6"]})
    difference = differences(tmp_path, *runs, comparison=comparison)["model.n_layers"]
    assert (difference.kind, difference.set_by) == ("other", ("deep",))


def test_a_variant_that_sets_a_whole_group_is_named_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Comparison(command=[], base=[], variants={"a": [], "deep": ["ffn=dense", "model=small"]}).save(tmp_path / name)
    runs = [FakeRun("a", 1), FakeRun("deep", 1, config={"model": {"n_layers": 6}})]
    for run in runs:
        run.write(tmp_path / "one" / "runs")
    result = {d.key: d for d in find_differences(*read_runs([tmp_path]))}
    assert result["model.n_layers"].set_by == ("deep",)


def test_run_directories_may_lie_anywhere(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "here")
    FakeRun("b", 1).write(tmp_path / "there" / "else")
    runs, _ = read_runs([tmp_path / "here", tmp_path / "there"])
    assert find_differences(runs, []) == []


def test_what_a_sweep_varies_is_no_unfair_difference(tmp_path: Path) -> None:
    for i, rate in enumerate((0.1, 0.2)):
        FakeRun(str(i), 1, config={"optim": {"lr": rate}, "model": {"n_layers": i}}).write(tmp_path)
    runs = read_runs([tmp_path])[0]
    (tmp_path / "sweep.csv").write_text("run,status,reason,optim.lr\n0,finished,,0.1\n")
    assert varied_keys([tmp_path]) == ("optim.lr",)
    assert varied_keys([tmp_path, tmp_path / "0"]) == ()
    kinds = {d.key: d.kind for d in find_differences(runs, [], varied_keys([tmp_path]))}
    assert (kinds["optim.lr"], kinds["model.n_layers"]) == ("sweep", "other")
    assert {d.key for d in make_study([tmp_path], SETTINGS).unfair} >= {"model.n_layers"}
    assert "optim.lr" not in {d.key for d in make_study([tmp_path], SETTINGS).unfair}
