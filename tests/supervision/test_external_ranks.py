"""Ranks that torchrun or SLURM started: rank 0 decides, all follow, and a refusal is printed once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launches import DDP, end, free_port, small_fit, srun, torchrun
from processes import finish, fit, metrics
from small import SMALL_RUN, resolved


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "overrides", "message"),
    [
        (None, DDP, "has no run.json"),
        ({"status": "finished"}, DDP, "holds a run that finished"),
        ({"status": "interrupted"}, [*DDP, "model.dim=128"], "another configuration (model.dim: 64 -> 128"),
        ({"status": "interrupted"}, [], "makes 1 rank(s), but 2 were started externally"),
        ("not a record", DDP, "run.json"),
    ],
)
def test_a_refusal_of_rank_0_ends_all_ranks_and_is_printed_once(
    tmp_path: Path, saved: object, overrides: list[str], message: str
) -> None:
    """Whatever rank 0 refuses after it has read the run directory: the others wait for its decision."""
    run = tmp_path / "run"
    run.mkdir()
    if saved is None:
        (run / "thesis.tex").write_text("")
    else:
        (run / "run.json").write_text(json.dumps(saved))
        small = resolved(*SMALL_RUN, f"run_dir={run}").config
        (run / "config.yaml").write_text(yaml.safe_dump(small, sort_keys=False))
    small_run = SMALL_RUN if overrides else []
    ended = end(srun(*small_run, *overrides, "run_dir=run", cwd=tmp_path))
    assert [code for code, _ in ended] == [2, 2], ended
    assert [message in out for _, out in ended] == [True, False], ended
    assert ["error: " in out for _, out in ended] == [True, False], ended


@pytest.mark.slow
def test_a_number_of_ranks_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for overrides, made in ((DDP, 2), ([], 1)):
        ended = end(srun(*SMALL_RUN, *overrides, "run_dir=run", cwd=tmp_path, tasks=3))
        assert [code for code, _ in ended] == [2] * 3, ended
        assert f"makes {made} rank(s), but 3 were started externally" in ended[0][1]
        assert ["error:" in out for _, out in ended[:2]] == [True, False]


@pytest.mark.slow
def test_run_dir_must_be_given(tmp_path: Path) -> None:
    for code, out in end(srun(*SMALL_RUN, *DDP, cwd=tmp_path)):
        assert code == 2
        assert "run_dir is not set; ranks that were started externally need run_dir=PATH" in out


@pytest.mark.slow
def test_slurm_on_two_nodes_reaches_the_losses_of_one_process(tmp_path: Path) -> None:
    ended = end(srun(*SMALL_RUN, *DDP, "trainer.num_nodes=2", "run_dir=four", cwd=tmp_path, nodes=2))
    assert [code for code, _ in ended] == [0] * 4, ended
    assert record(tmp_path / "four")["world_size"] == 4
    finish(fit("run_dir=one", cwd=tmp_path))
    for four, one in zip(metrics(tmp_path / "four"), metrics(tmp_path / "one"), strict=True):
        for name in ("train/loss", "val/loss"):
            assert not one[name] or float(four[name]) == pytest.approx(float(one[name]), rel=1e-3)


@pytest.mark.slow
def test_a_run_under_torchrun_stops_in_order_and_goes_on_without_its_overrides(tmp_path: Path) -> None:
    steps = ["trainer.max_steps=40"]

    def launch(command: list[str]) -> list[Any]:
        options = ["--nproc-per-node=2", f"--master-port={free_port()}"]
        return [torchrun(*options, command=command, cwd=tmp_path)]

    ((code, out),) = end(launch(small_fit(*steps, "run_dir=whole")))
    assert code == 0, out
    stopped, run = launch(small_fit(*steps, "run_dir=run")), tmp_path / "run"
    while not ((run / "metrics.csv").exists() and len(metrics(run)) >= 3):
        assert stopped[0].poll() is None
        time.sleep(0.02)
    stopped[0].send_signal(signal.SIGTERM)
    ((code, out),) = end(stopped)
    assert code != 0
    assert record(run)["status"] == "interrupted", out
    assert int(metrics(run)[-1]["step"]) < 40
    ((code, out),) = end(launch(["-m", "pkm_lightning", "fit", "run_dir=run"]))
    assert code == 0, out
    assert record(run)["world_size"] == 2
    assert metrics(run) == metrics(tmp_path / "whole")
    ((code, out),) = end(launch(small_fit(*steps, "run_dir=run")))
    assert code == 1
    assert out.count("holds a run that finished") == 1
