"""The address at which ranks meet is checked before anything waits there."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from small import Run

from pkm_lightning.cli.environment import check_rank_variables
from pkm_lightning.errors import ConfigError
from pkm_lightning.supervision.meeting_point import check_meeting_point

TWO_RANKS = ["strategy=ddp", "devices=2", "trainer.accelerator=cpu", "run_dir=run"]


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_port_in_use_is_refused_at_once(cli: Run, monkeypatch: pytest.MonkeyPatch, port_in_use: int) -> None:
    monkeypatch.setenv("MASTER_PORT", str(port_in_use))
    shown = cli("fit", *TWO_RANKS)
    assert shown.code == 2
    assert f"MASTER_PORT={port_in_use} cannot be used" in shown.err
    assert "free port" in shown.err


def test_the_port_of_torchrun_is_in_use(monkeypatch: pytest.MonkeyPatch, port_in_use: int) -> None:
    monkeypatch.setenv("MASTER_PORT", str(port_in_use))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    check_meeting_point(LightningEnvironment())


def test_an_unknown_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=no such host is not known"):
        check_meeting_point(LightningEnvironment())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", "abc"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "٣٣٣٣"),
        ("RANK", "first"),
        ("LOCAL_RANK", "-1"),
        ("WORLD_SIZE", "2.0"),
        ("NODE_RANK", ""),
        ("SLURM_PROCID", "x"),
    ],
)
def test_what_is_no_number_is_refused_by_every_verb(
    cli: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    shown = cli("test", "run_dir=run")
    assert shown.code == 2
    assert f"the environment variable {name}={value!r} is not" in shown.err


@pytest.mark.parametrize(
    ("rank", "count"),
    [("RANK=5", "WORLD_SIZE=2"), ("RANK=2", "WORLD_SIZE=2"), ("LOCAL_RANK=1", "LOCAL_WORLD_SIZE=1")],
)
def test_a_rank_beyond_their_number_is_refused(rank: str, count: str) -> None:
    with pytest.raises(ConfigError, match=f"{rank} and {count} contradict each other: ranks are numbered from 0"):
        check_rank_variables(dict(setting.split("=") for setting in (rank, count)))


def test_what_launchers_set_is_accepted() -> None:
    check_rank_variables({"RANK": "0", "WORLD_SIZE": "16", "MASTER_PORT": "29500", "MASTER_ADDR": "node-1"})
