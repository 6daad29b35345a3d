"""What makes two runs incomparable is found, wherever it hides; what a comparison is about is not complained of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_folders import FakeRun, ladder
from studies import SETTINGS

from pkm_lightning.compare.comparison_file import Comparison
from pkm_lightning.compare.differences import Difference, equal_seconds, find_differences
from pkm_lightning.compare.records import read_runs
from pkm_lightning.compare.study import make_study


def differences(root: Path, *runs: FakeRun, comparison: Comparison | None = None) -> dict[str, Difference]:
    for run in runs:
        run.write(root)
    return {d.key: d for d in find_differences(read_runs([root])[0], [comparison] if comparison else [])}


def test_a_fair_comparison_differs_in_ffn_and_seed_alone(tmp_path: Path) -> None:
    found = differences(tmp_path, *ladder())
    assert {d.kind for d in found.values()} == {"ffn", "seed"}
    assert {"ffn._target_", "ffn.hidden_dim", "seed", "data.order_seed"} == set(found)


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
def test_a_secret_difference_is_caught(
    tmp_path: Path, config: dict[str, Any], record: dict[str, Any], key: str, where: str
) -> None:
    odd = ("dense", 1, "Dense") if where == "another variant" else ("memory_plus", 2, "MemoryPlus")
    arm, seed, ffn = odd
    found = differences(tmp_path, FakeRun("memory_plus", 1), FakeRun(arm, seed, ffn=ffn, config=config, record=record))
    assert found[key].kind == "other"
    assert next(iter(found)) in {d.key for d in found.values() if d.kind == "other"}


@pytest.mark.parametrize("unknown", [{"status": "running"}, {"status": "failed", "reason": "no data"}])
def test_what_a_run_has_not_come_to_know_is_no_difference(tmp_path: Path, unknown: dict[str, Any]) -> None:
    started = FakeRun("memory_plus", 1, record={**unknown, "device": None, "world_size": None, "data": None})
    assert not [d for d in differences(tmp_path, FakeRun("memory_plus", 2), started).values() if d.kind == "other"]
    elsewhere = FakeRun("memory_plus", 3, record={**unknown, "device": "NVIDIA H200", "data": None})
    assert {d.key for d in differences(tmp_path, elsewhere).values() if d.kind == "other"} == {"run.json: device"}


def test_within_a_variant_not_even_the_ffn_may_differ(tmp_path: Path) -> None:
    found = differences(tmp_path, FakeRun("a", 1, flops=1000), FakeRun("a", 2, flops=2000))
    assert found["ffn.hidden_dim"].kind == "other"


def test_a_data_order_that_does_not_follow_the_seed_is_other(tmp_path: Path) -> None:
    found = differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, config={"data": {"order_seed": 9}}))
    assert found["data.order_seed"].kind == "other"


def test_a_knob_outside_the_ffn_that_was_solved_is_its_size(tmp_path: Path) -> None:
    solved = {"model": {"base_ffn": {"hidden_dim": 119}}, "ffn": {"_size_by_": {"flops": "model.base_ffn.hidden_dim"}}}
    other = {"model": {"base_ffn": {"hidden_dim": 172}}}
    found = differences(tmp_path, FakeRun("ultramem", 1, config=solved), FakeRun("dense", 1, config=other))
    assert found["model.base_ffn.hidden_dim"].kind == "ffn"


def test_learning_rates_of_the_sweep_are_said_and_not_complained_of(tmp_path: Path) -> None:
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


def test_of_merged_comparisons_each_arm_needs_its_own_excuse(tmp_path: Path) -> None:
    FakeRun("a", 1, config={"optim": {"lr": 0.003}}).write(tmp_path)
    FakeRun("loose", 1).write(tmp_path)
    swept = Comparison(command=[], base=[], variants={"a": []}, sweep={"chosen": {"a": 0.003}}, seconds=60)
    other = Comparison(command=[], base=[], variants={"loose": []}, seconds=120)
    runs, _ = read_runs([tmp_path])
    for comparisons in ([swept], [swept, other]):
        assert {d.key: d.kind for d in find_differences(runs, comparisons)}["optim.lr"] == "other"
    assert equal_seconds(runs, [swept]) is None
    assert equal_seconds(runs, [swept, other]) is None


def test_rates_of_two_sweeps_that_tried_different_things_are_no_equal_procedure(tmp_path: Path) -> None:
    FakeRun("a", 1, config={"optim": {"lr": 0.003}}).write(tmp_path)
    FakeRun("b", 1).write(tmp_path)
    runs, _ = read_runs([tmp_path])
    tried = {"learning_rates": [0.003, 0.006], "results": {}}
    both = [
        Comparison(command=[], base=[], variants={arm: []}, sweep={**tried, "seeds": [seed], "chosen": {arm: rate}})
        for arm, seed, rate in (("a", 1001, 0.003), ("b", 1002, 0.006))
    ]
    assert {d.key: d.kind for d in find_differences(runs, both)}["optim.lr"] == "other"
    assert both[1].sweep is not None
    both[1].sweep["seeds"] = [1001]
    assert {d.key: d.kind for d in find_differences(runs, both)}["optim.lr"] == "sweep"


def test_a_sweep_under_other_conditions_is_told(tmp_path: Path) -> None:
    asked = {"learning_rates": [0.003, 0.006], "seeds": [1001], "data_seed": 1000, "metric": "test/loss"}
    sweep = {**asked, "results": {}, "chosen": {"a": 0.006, "b": 0.006}}
    Comparison(command=[], base=[], variants={"a": [], "b": []}, seeds=[1], sweep=sweep).save(tmp_path)
    for arm in ("a", "b"):
        FakeRun(arm, 1).write(tmp_path / "runs")
        for rate in (0.003, 0.006):
            run = FakeRun(arm, 1001, data_seed=1000, config={"optim": {"lr": rate}})
            run.write(tmp_path / "sweep", f"{arm}/lr-{rate}/seed-1001")
    assert make_study([tmp_path], SETTINGS).unfair == []
    other = FakeRun("b", 1002, data_seed=1000, config={"trainer": {"precision": "bf16-mixed"}})
    other.write(tmp_path / "sweep", "b/lr-0.003/seed-1002")
    (told,) = make_study([tmp_path], SETTINGS).unfair
    assert told.key == "sweep: trainer.precision"
    assert told.values["b"] == ("32-true", "bf16-mixed")


def test_where_a_machine_keeps_its_caches_makes_no_difference(tmp_path: Path) -> None:
    assert differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, config={"data": {"cache_dir": "/mnt/x"}})) == {}


def test_variants_of_which_some_were_not_matched_are_told(tmp_path: Path) -> None:
    found = differences(tmp_path, FakeRun("a", 1), FakeRun("b", 1, flops=9000, config={"match": "none"}))
    assert found["match"].kind == "other"


@pytest.mark.parametrize(
    ("seed", "tokens", "told"), [(1, 995_000, False), (1, 970_000, True), (2, 970_000, False), (2, 800_000, True)]
)
def test_unequal_tokens_are_told(tmp_path: Path, seed: int, tokens: int, told: bool) -> None:
    """Another seed packs rows in another order, so that the same steps have a few more tokens or less."""
    found = differences(tmp_path, FakeRun("a", 1), FakeRun("b", seed, record={"tokens": tokens}))
    assert ("run.json: tokens" in found) is told


@pytest.mark.parametrize(("seconds", "told"), [(95.0, False), (60.0, True)])
def test_runs_of_equal_seconds_may_differ_in_tokens_but_not_in_seconds(
    tmp_path: Path, seconds: float, told: bool
) -> None:
    comparison = Comparison(command=[], base=[], variants={"a": [], "b": []}, seconds=100)
    runs = [FakeRun("a", 1), FakeRun("b", 1, seconds=seconds, record={"tokens": 300})]
    found = differences(tmp_path, *runs, comparison=comparison)
    assert ("run.json: seconds_train" in found) is told
    assert "run.json: tokens" not in found


def test_who_asked_for_a_difference_is_named(tmp_path: Path) -> None:
    runs = [FakeRun("a", 1), FakeRun("deep", 1, config={"model": {"n_layers": 6}})]
    comparison = Comparison(command=[], base=[], variants={"a": [], "deep": ["ffn=dense", "model.n_layers=6"]})
    difference = differences(tmp_path, *runs, comparison=comparison)["model.n_layers"]
    assert (difference.kind, difference.set_by) == ("other", ("deep",))


def test_who_asked_for_a_whole_group_is_named_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Comparison(command=[], base=[], variants={"a": [], "deep": ["ffn=dense", "model=small"]}).save(tmp_path / name)
    runs = [FakeRun("a", 1), FakeRun("deep", 1, config={"model": {"n_layers": 6}})]
    for run in runs:
        run.write(tmp_path / "one" / "runs")
    found = {d.key: d for d in find_differences(*read_runs([tmp_path]))}
    assert found["model.n_layers"].set_by == ("deep",)


def test_run_directories_may_lie_anywhere(tmp_path: Path) -> None:
    FakeRun("a", 1).write(tmp_path / "here")
    FakeRun("b", 1).write(tmp_path / "there" / "else")
    runs, _ = read_runs([tmp_path / "here", tmp_path / "there"])
    assert find_differences(runs, []) == []
