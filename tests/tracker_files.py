"""Readers of what trackers have kept without a network: the log of a Weights & Biases run, and an MLflow store."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Steps and values by metric, in the order in which they were logged.
History = dict[str, list[tuple[int, float]]]


def wandb_history(run_dir: Path) -> History:
    """Returns what the sittings of a run have logged, in the order of their start; pictures and tables are left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    history: History = {}
    for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        for content in _log_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for name, value in items.items():
                    if isinstance(value, float | int):
                        history.setdefault(name, []).append((items["trainer/global_step"], value))
    return history


def wandb_config(run_dir: Path) -> dict[str, Any]:
    """Returns the hyperparameters of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    config: dict[str, Any] = {}
    for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
        for content in _log_records(file.read_bytes()):
            update = Record.FromString(content).config.update
            config |= {item.key: json.loads(item.value_json) for item in update if item.key}
    return config


def _log_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a log in LevelDB's format: blocks of 32 KiB, in which a record may be in several pieces."""
    size, header = 2**15, struct.Struct("<IHB")
    position, begun = 7, b""  # behind the identification of the format
    while position + header.size <= len(content):
        if size - position % size < header.size:  # the rest of a block is too short for a piece
            position += size - position % size
            continue
        _, length, kind = header.unpack_from(content, position)
        begun += content[position + header.size : position + header.size + length]
        position += header.size + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield begun
            begun = b""


def mlflow_run(run_dir: Path, run_id: str) -> tuple[History, Any]:
    """Returns what a run in the store of `run_dir` has logged, and the run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir / 'mlflow' / 'mlflow.db'}")
    run = client.get_run(run_id)
    of_metrics = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    return {name: [(point.step, point.value) for point in points] for name, points in of_metrics.items()}, run
