"""What loggers keep: the steps and values of metrics.csv, in runs that a continued run goes on with."""

from __future__ import annotations

import copy
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from processes import finish, start
from small import Run, record, resolved, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracker_files import History, mlflow_run, wandb_config, wandb_history

from pkm_lightning.cli import loggers
from pkm_lightning.cli.hyperparameters import hyperparameters
from pkm_lightning.cli.resume import differences, saved_config
from pkm_lightning.errors import ConfigError
from pkm_lightning.loggers.tensorboard import tag_of

COMMAND = [
    "fit", "data=text", "data.path=a.txt", "data.tokenizer=bytes", "data.seq_len=16", "data.global_batch_size=4",
    "model.n_layers=1", "model.dim=16", "model.ffn_dim=16", "model.n_heads=2", "model.n_kv_heads=2",
    "model.memory.n_keys=16", "callbacks=[metrics_csv,step_checkpoint,diagnostics,throughput,slot_usage,samples]",
    "callbacks.samples.prompts=[the]", "callbacks.samples.max_new_tokens=1", "trainer.log_every_n_steps=2",
    "callbacks.step_checkpoint.every_n_steps=4", "run_dir=run", "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=8", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1",
]  # fmt: skip
ALL = ["logger=[tensorboard,wandb,mlflow]", "logger.wandb.offline=true"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on a mat and saw the dog run under the old blue tree . " * 60)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    # Its process may take longer to start than the usual 30 s where many tests run at once.
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "300")


def of_metrics_csv(run_dir: Path) -> History:
    history: History = {}
    for row in rows(run_dir):
        for name, value in row.items():
            if value and "/" in name:
                history.setdefault(name, []).append((int(row["step"]), float(value)))
    return history


def of_tensorboard(run_dir: Path) -> History:
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def same_points(points: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in points] == [step for step, _ in expected]
    # TensorBoard holds single precision.
    single, wanted = (np.array([value for _, value in of], np.float32) for of in (points, expected))
    assert single.tolist() == wanted.tolist()


def check_histories(run_dir: Path, end: int, status: str = "FINISHED") -> None:
    """Compares what each logger has kept with metrics.csv, whose rows end at step `end`."""
    expected = of_metrics_csv(run_dir)
    assert [step for step, _ in expected["train/loss"]] == list(range(2, end + 1, 2))
    ids = record(run_dir)["loggers"]
    kept = wandb_history(run_dir)
    in_store, run = mlflow_run(run_dir, ids["mlflow"])
    assert run.info.status == status
    board = of_tensorboard(run_dir)
    for name, points in expected.items():
        same_points(kept[name], points)
        same_points(in_store[name], points)
        same_points(board[tag_of(name)], points)
    of_layer = "vitals/layer0.key_norm"
    assert [step for step, _ in board[of_layer]] == list(range(2, end + 1, 2))
    same_points(kept[of_layer], board[of_layer])
    same_points(in_store[of_layer], board[of_layer])
    for history in (kept, in_store, board):
        assert not {"step", "epoch", "hp_metric"} & history.keys()


def test_trackers_keep_the_rows_of_metrics_csv_and_a_continued_run_goes_on_in_them(
    cli: Run, text: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)
    run = tmp_path / "run"
    shown = cli(*COMMAND, *ALL, "trainer.max_steps=4")
    assert shown.code == 0, shown.err
    check_histories(run, end=4)
    assert "wandb sync" in shown.out + shown.err
    assert not re.search("Run history|Run summary|anonymous", shown.out + shown.err)
    ids = record(run)["loggers"]
    assert not {"MLFLOW_TRACKING_URI", "WANDB_MODE"} & os.environ.keys()

    shown = cli("fit", "run_dir=run", "trainer.max_steps=8", "resume=always")
    assert shown.code == 0, shown.err
    check_histories(run, end=8)
    assert record(run)["loggers"] == ids
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert of_tensorboard(run)["test/loss"][-1][0] == wandb_history(run)["test/loss"][-1][0] == 8
    assert [step for step, _ in wandb_history(run)["usage/layer0.slot/heat_map/width"]] == [4, 8]
    assert [step for step, _ in wandb_history(run)["samples/nrows"]] == [4, 8]
    assert wandb_config(run)["slots"] == 256
    assert mlflow_run(run, ids["mlflow"])[1].data.params["slots"] == "256"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Provides the list of connections that processes make to any server: all of them are sent to one of ours."""
    made: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                made.append(connection.recv(200))
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.lower(), address)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        # By these MLflow knows a test, in which it reports nothing to its makers anyway.
        for name in ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
            monkeypatch.delenv(name, raising=False)
        yield made
        server.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_nothing_is_sent(text: None, tmp_path: Path, connections: list[Any]) -> None:
    run, long = tmp_path / "run", [*COMMAND, *ALL, "trainer.max_steps=60", "callbacks.step_checkpoint.every_n_steps=60"]
    first = start(*long, cwd=tmp_path)
    wait_until(lambda: (run / "metrics.csv").exists() and len(rows(run)) > 4)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 130, out
    ids = record(run)["loggers"]
    assert mlflow_run(run, ids["mlflow"])[1].info.status == "KILLED"
    finish(start(*long, cwd=tmp_path))
    assert record(run)["loggers"] == ids
    check_histories(run, end=60)
    assert connections == []


@pytest.mark.slow
def test_of_two_ranks_one_logs(text: None, tmp_path: Path) -> None:
    finish(start(*COMMAND, *ALL, "trainer.max_steps=4", "strategy=ddp", "devices=2", cwd=tmp_path))
    check_histories(tmp_path / "run", end=4)
    assert len(list(tmp_path.glob("run/wandb/offline-run-*"))) == 1


@pytest.mark.slow
def test_runs_of_a_sweep_are_runs_of_their_own(text: None, tmp_path: Path) -> None:
    finish(start("fit", "-m", *COMMAND[1:], *ALL, "trainer.max_steps=4", "seed=1,2", cwd=tmp_path))
    for job in ("0", "1"):
        check_histories(tmp_path / "run" / job, end=4)
    ids = [record(tmp_path / "run" / job)["loggers"] for job in ("0", "1")]
    assert not set(ids[0].values()) & set(ids[1].values())


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_command(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(f"logger={tracker}").config
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"logger={tracker} needs {tracker}.* pip install 'pkm_lightning\[{tracker}"):
        loggers.check_loggers(config)


def test_an_argument_that_wandb_does_not_take_is_refused() -> None:
    config = resolved("logger=wandb", "+logger.wandb.entitty=me").config
    with pytest.raises(ConfigError, match=r"logger.wandb.entitty is not an argument of wandb.init.*entity"):
        loggers.check_loggers(config)


@pytest.mark.slow
def test_a_store_that_cannot_be_opened_is_named_and_nothing_stays(cli: Run, text: None, tmp_path: Path) -> None:
    shown = cli(
        *COMMAND,
        "logger=[wandb,mlflow]",
        "logger.wandb.offline=true",
        "logger.mlflow.tracking_uri=nonsense://x",
        "trainer.max_steps=2",
    )
    assert shown.code == 2
    assert "logger.mlflow cannot start: " in shown.err
    assert "nonsense://x, of logger.mlflow.tracking_uri or MLFLOW_TRACKING_URI" in shown.err
    assert not (tmp_path / "run").exists()
    assert wandb.run is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ffn=dense"], {"ffn": "Dense", "slots": 0, "heads": 0, "knn": 0, "lr": 0.006, "dim": 64}),
        (["ffn=memory_plus", "seed=3"], {"ffn": "MemoryPlus", "slots": 65536, "heads": 1, "knn": 32, "seed": 3}),
        (["ffn=moe", "optim.lr=0.1"], {"ffn": "MoE", "lr": 0.1, "global_batch_size": 32, "data": "Facts"}),
    ],
)
def test_hyperparameters_have_the_same_names_for_every_ffn(overrides: list[str], expected: dict[str, Any]) -> None:
    found = hyperparameters(resolved(*overrides))
    assert found | expected == found
    assert found.keys() == hyperparameters(resolved()).keys()
    assert len(found) <= 20
    assert all(isinstance(value, int | float | str) for value in found.values())


def test_only_the_store_in_the_run_directory_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    from sqlalchemy import create_engine, text

    with loggers._without_syncs(tmp_path / "mlflow.db"):
        engines = [create_engine(f"sqlite:///{tmp_path / name}") for name in ("mlflow.db", "other.db")]
        found = [engine.connect().execute(text("PRAGMA synchronous")).scalar() for engine in engines]
    assert found == [0, 2]
    assert create_engine(f"sqlite:///{tmp_path / 'mlflow.db'}").connect().execute(text("PRAGMA synchronous")).scalar()


def test_the_tensorboard_logger_of_an_earlier_version_is_that_of_today(tmp_path: Path) -> None:
    config = resolved(f"run_dir={tmp_path}").config
    earlier = copy.deepcopy(config)
    earlier["logger"]["tensorboard"]["_target_"] = "lightning.pytorch.loggers.TensorBoardLogger"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier))
    saved = saved_config(tmp_path, trust=False, cache=config["data"]["cache_dir"])
    assert differences(saved, config) == []
