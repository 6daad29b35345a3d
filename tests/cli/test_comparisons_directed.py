"""The decisions of `compare` over several commands: rates, steps, which runs are started. Its runs are stand-ins."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_jobs import run_job, stand_in_for_fit
from processes import held_elsewhere
from small import Outcome, Run
from toys import config

from pkm_lightning.cli import comparison_director
from pkm_lightning.cli.comparison_variants import compiled_shape, is_one_process

LENGTH = "trainer.max_steps=10"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Returns `compare("ffn=dense", ...)`, which runs into the folder `out`, by default without warm-up."""
    stand_in_for_fit(monkeypatch, tmp_path)

    def run(*overrides: str) -> Outcome:
        warm_up = [] if any(override.startswith("warm_up") for override in overrides) else ["warm_up=false"]
        return run_job("compare", *overrides, *warm_up, "out=out")

    return run


def content(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return stored


def set_fates(folder: Path, **fates: Any) -> None:
    (folder / "fates.json").write_text(json.dumps(fates))


@pytest.mark.parametrize("length", [LENGTH, "budget.tokens=4e3"])
def test_one_variant_per_compiled_shape_warms_up_once(
    compare: Run, tmp_path: Path, length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = tmp_path / "out" / "speed" / "dense" / "warm-up" / "run.json"
    command = ["ffn=dense,moe", length, "warm_up=true"]
    assert compare(*command, "seeds=1").code == 0
    assert not warm.parent.parent.exists(), "on a CPU no kernel depends on shapes"
    monkeypatch.setattr(comparison_director, "compiled_shape", lambda config: "the same")
    assert compare(*command, "seeds=1").code == 0
    assert not warm.exists(), "a variant that has been run is warm"
    set_fates(tmp_path, **{"warm-up": "killed"})
    assert compare(*command, "seeds=1", "resume=never").code == 0
    assert json.loads(warm.read_text())["status"] == "running"
    assert not (warm.parents[2] / "moe").exists(), "a variant of the same shape is warm"
    set_fates(tmp_path)
    for name in ("dense", "moe"):
        (tmp_path / "out" / "runs" / name).rename(tmp_path / name)
    assert compare(*command, "seeds=1").code == 0
    assert json.loads(warm.read_text())["status"] == "finished", "one that was killed is not warm"
    before = warm.stat().st_mtime_ns
    assert compare(*command, "seeds=2").code == 0
    assert warm.stat().st_mtime_ns == before


def test_which_runs_are_forked_and_which_share_their_kernels() -> None:
    on_cpu = "trainer.accelerator=cpu"
    base = config("model.compile=true", on_cpu)
    faster = {**base, "optim": {**base["optim"], "lr": 1.0}, "data": {**base["data"], "draw": 3}}
    wider = {**base, "model": {**base["model"], "dim": 128}}
    on_gpu = {**base, "trainer": {**base["trainer"], "accelerator": "gpu"}}
    assert compiled_shape(config(on_cpu)) is None
    assert compiled_shape(faster) == compiled_shape(base) is not None
    assert len({compiled_shape(variant) for variant in (base, wider, on_gpu)}) == 3
    assert is_one_process(config(on_cpu))
    others = (["devices=2"], ["strategy=ddp"], ["trainer.num_nodes=2"])
    assert not any(is_one_process(config(on_cpu, *other)) for other in others)
    assert not is_one_process(config("trainer.accelerator=gpu"))


def test_a_variant_keeps_the_rate_that_its_runs_started_with(compare: Run, tmp_path: Path) -> None:
    """Fails the run of a rate in the first command: winning in the second one is too late."""
    command = ["ffn=dense", "lr_sweep=[3e-3,6e-3]", LENGTH]
    set_fates(tmp_path, **{"lr-0.006": "killed"})
    assert compare(*command, "seeds=1").code == 0
    set_fates(tmp_path)
    assert compare(*command, "seeds=2").code == 0
    sweep = content(tmp_path)["sweep"]
    assert sweep["results"]["dense"]["0.006"] == 1.0
    assert sweep["chosen"] == {"dense": 0.003}
    configs = [yaml.safe_load(file.read_text()) for file in (tmp_path / "out" / "runs").glob("dense/*/config.yaml")]
    assert [config["optim"]["lr"] for config in configs] == [0.003, 0.003]
    assert "differ in more" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("length", "refusals"),
    [
        (
            LENGTH,
            {
                "moe is ffn=moe there": ["+variants.moe={ffn.top_k: 4}", LENGTH],
                "trainer.max_steps=.* is set by one": ["trainer.max_steps=20"],
                "is less than a step": ["budget.tokens=1"],
            },
        ),
        (
            "budget.tokens=4e3",
            {
                "dense is .*trainer.max_steps=.* there": ["budget.tokens=8e3"],
                "is less than a step": ["budget.tokens=1", "resume=never"],
            },
        ),
    ],
)
def test_a_refused_command_changes_nothing(
    compare: Run, tmp_path: Path, length: str, refusals: dict[str, list[str]]
) -> None:
    assert compare("ffn=dense,moe", "seeds=1", length).code == 0
    before = (tmp_path / "out" / "compare.json").read_text()
    for message, overrides in refusals.items():
        refused = compare("ffn=dense,moe", "seeds=3", "warm_up=true", *overrides)
        assert refused.code == 2
        assert re.search(message, refused.err), refused.err
        assert (tmp_path / "out" / "compare.json").read_text() == before
        assert not (tmp_path / "out" / "speed").exists()
        assert (tmp_path / "out" / "runs" / "dense" / "seed-1" / "run.json").exists()


def test_all_commands_are_listed_and_a_report_reads_a_directory_named_by_a_number(compare: Run, tmp_path: Path) -> None:
    for seeds in ("seeds=1", "seeds=2", "seeds=1"):
        assert compare("ffn=dense", LENGTH, seeds).code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.index("seeds=2") < report.index("seeds=1")
    assert report.count("python -m pkm_lightning compare") == 2
    (tmp_path / "out").rename(tmp_path / "2024")
    assert run_job("report", "runs=[2024]", "out=2025").code == 0
    assert (tmp_path / "2025" / "report.md").exists()


def test_a_command_ends_as_its_own_runs_did(compare: Run, tmp_path: Path) -> None:
    set_fates(tmp_path, **{"runs/moe": "failed"})
    failed = compare("ffn=dense,moe", "seeds=1", LENGTH)
    assert failed.code == 2
    assert "moe seed 1" in failed.err
    assert "resume=always" in failed.err
    assert compare("ffn=dense", "seeds=1", LENGTH).code == 0
    set_fates(tmp_path)
    assert compare("ffn=dense,moe", "seeds=1", LENGTH).code == 2
    assert compare("ffn=dense,moe", "seeds=1", LENGTH, "resume=always").code == 0
    assert content(tmp_path)["failures"] == {}


def test_the_reason_of_a_killed_run_outlives_commands_about_others(compare: Run, tmp_path: Path) -> None:
    set_fates(tmp_path, **{"runs/moe": "killed"})
    assert compare("ffn=dense,moe", "seeds=1", LENGTH).code == 2
    assert compare("ffn=dense", "seeds=1", LENGTH).code == 0
    assert "killed by SIGKILL" in (tmp_path / "out" / "report.md").read_text()


def test_a_diverged_run_is_not_to_be_retried_and_a_variant_without_a_rate_fails_alone(
    compare: Run, tmp_path: Path
) -> None:
    set_fates(tmp_path, **{"runs/moe": "diverged"})
    failed = compare("ffn=dense,moe", "seeds=1", LENGTH)
    assert (failed.code, "resume=always" in failed.err) == (2, False)
    assert "diverged" in (tmp_path / "out" / "report.md").read_text()
    shutil.rmtree(tmp_path / "out")
    set_fates(tmp_path, **{"sweep/moe": "diverged"})
    failed = compare("ffn=dense,moe", "seeds=1", LENGTH, "lr_sweep=[3e-3,6e-3]")
    assert "moe seed 1" in failed.err
    assert "no learning rate of the sweep ended with a finite val/loss" in (tmp_path / "out/report.md").read_text()
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["dense"]


def test_a_speed_is_measured_for_new_variants_alone(compare: Run, tmp_path: Path) -> None:
    set_fates(tmp_path, **{"speed/moe/try-2": "failed"})
    command = ["ffn=dense,moe", "seeds=1", "budget.seconds=4", "trainer.accumulate_grad_batches=2"]
    failed = compare(*command)
    assert "moe seed 1" in failed.err
    assert "no luck" in (tmp_path / "out" / "report.md").read_text()
    assert content(tmp_path)["arms"] == {
        "dense": ["ffn=dense", "trainer.max_steps=200", "trainer.val_check_interval=40"]
    }
    assert compare(*command).code == 2
    assert "no luck" in (tmp_path / "out" / "report.md").read_text(), "the reason of the first command stays"
    set_fates(tmp_path)
    assert compare(*command, "resume=always").code == 0
    assert set(content(tmp_path)["steps_per_second"]) == {"dense", "moe"}


def test_never_refuses_runs_that_are_held_and_leaves_a_comparison(compare: Run, tmp_path: Path) -> None:
    command = ["seeds=1", LENGTH, "resume=never"]
    assert compare("ffn=dense", *command).code == 0
    run = tmp_path / "out" / "runs" / "dense" / "seed-1"
    with held_elsewhere(run):
        refused = compare("ffn=moe", *command)
    assert "is in use by another process" in refused.err
    assert (run / "run.json").exists()
    assert compare("ffn=moe", *command).code == 0
    assert list(content(tmp_path)["arms"]) == ["moe"]
    assert not run.exists()


def test_a_wrong_metric_of_the_sweep_is_refused_every_time(compare: Run, tmp_path: Path) -> None:
    command = ["ffn=dense", "seeds=1", "lr_sweep=[3e-3,6e-3]", LENGTH]
    for metric, message in (
        ("test/loss", "sweep.metric=test/loss is a figure of the test"),
        ("val/recall_riddle", "sweep.metric=val/recall_riddle is about questions of the form riddle"),
    ):
        refused = compare(*command, f"sweep.metric={metric}")
        assert message in refused.err
    assert not (tmp_path / "out").exists()


_TOO_LONG = "both set the length of a run"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing to compare; name FFNs"),
        (["ffn=dense", "budget.tokens=4e3", "trainer.max_steps=9"], _TOO_LONG),
        (["ffn=dense", "budget.tokens=4e3", "+variants.b={ffn: dense, trainer.max_steps: 9}"], _TOO_LONG),
        (["ffn=dense", "budget.seconds=4", "+variants.b={ffn: dense, ++trainer.max_steps: 9}"], _TOO_LONG),
        (["ffn=dense", "optim.lr=0.1", "lr_sweep=[0.1,0.2]"], "both set the learning rate"),
        (["ffn=dense", "seeds=0"], "seeds=0 is out of range"),
        (["ffn=dense", "seed=3"], "compare sets seed of each run itself; set seeds="),
        (["ffn=dense", "run_dir=x"], "compare sets run_dir of each run itself; set out="),
        (["ffn=dense", "resume=sometimes"], "resume='sometimes' is not known"),
    ],
)
def test_a_command_that_cannot_work_writes_nothing(
    compare: Run, tmp_path: Path, overrides: list[str], message: str
) -> None:
    refused = compare(*overrides)
    assert refused.code == 2
    assert message in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "overrides", "message"),
    [
        ("compare", ["ffn=dense"], "out is not set"),
        ("report", ["out=out"], "runs is not set"),
        ("report", ["runs=[nowhere]", "out=out"], "nowhere is not a directory"),
        ("report", ["runs=[.]", "out=out"], "holds no record of a run"),
        ("report", ["runs=[.]"], "out is not set"),
    ],
)
def test_a_command_without_its_directories_is_refused(
    compare: Run, tmp_path: Path, verb: str, overrides: list[str], message: str
) -> None:
    refused = run_job(verb, *overrides)
    assert message in refused.err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_something_else_is_refused(compare: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert "is not empty (thesis.tex) and holds no comparison" in compare("ffn=dense", LENGTH).err
    (tmp_path / "out" / "thesis.tex").unlink()
    with held_elsewhere(tmp_path / "out"):
        assert "is held by another comparison" in compare("ffn=dense", LENGTH).err
