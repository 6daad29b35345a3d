"""A saved configuration names where a run writes: inside its directory, or the user must trust it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pkm_lightning.cli.places import check_links, check_places, with_own_cache
from pkm_lightning.errors import ConfigError

OURS = {"_target_": "pkm_lightning.data.JsonlDataModule"}


def saved(run: Path, **changes: Any) -> dict[str, Any]:
    """Returns a configuration as `fit` saves it, with dotted keys changed."""
    config = OmegaConf.create(
        {
            "run_dir": str(run),
            "ckpt": None,
            "out": "/elsewhere/predictions.jsonl",
            "data": {
                **OURS,
                "path": "/corpora/facts.jsonl",
                "tokenizer": "/corpora/tokenizer.json",
                "cache_dir": "~/c",
            },
            "callbacks": {
                "metrics_csv": {"path": f"{run}/metrics.csv"},
                "step_checkpoint": {"dirpath": f"{run}/checkpoints"},
                "samples": {"prompts": ["/imagine ../ a path", "~5 kg"], "monitor": "val/loss"},
            },
            "logger": {"tensorboard": {"save_dir": str(run), "name": "", "version": "tensorboard"}},
            "trainer": {"profiler": None, "default_root_dir": None},
            "strategy": {},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def test_what_a_run_saves_itself_is_accepted(tmp_path: Path) -> None:
    check_places(saved(tmp_path), "config.yaml", tmp_path, allowed=["~/c"])
    inside = {"data.cache_dir": str(tmp_path / "cache"), "callbacks.x.path": f"{tmp_path}/a/../b.csv"}
    check_places(saved(tmp_path, **inside), "config.yaml", tmp_path)


def test_rows_and_weights_that_a_model_reads_may_lie_anywhere(tmp_path: Path) -> None:
    group = {
        "ffn": {"_target_": "pkm_lightning.ffn.PretrainedEngram", "path": "/models/qwen"},
        "table": {"_target_": "pkm_lightning.memory.ValueTable", "path": "/rows.safetensors", "tensor": "/rows"},
    }
    config = saved(tmp_path, **group, **{"extra_ffns.x": {"ffn": group["ffn"], "table": {"path": "/rows"}}})
    check_places(config, "config.yaml", tmp_path, allowed=["~/c"])
    for key in ("ffn", "table", "extra_ffns.x.ffn"):
        foreign = OmegaConf.create(config)
        OmegaConf.update(foreign, f"{key}._target_", "theirs.Class")
        with pytest.raises(ConfigError, match=rf"config\.yaml names {key}\.path="):
            check_places(OmegaConf.to_container(foreign), "config.yaml", tmp_path, allowed=["~/c"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks.metrics_csv.path", "/etc/cron.d/job"),
        ("callbacks.metrics_csv.path", "notes.csv"),
        ("callbacks.metrics_csv.path", "~/.profile"),
        ("callbacks.metrics_csv.path", "RUN/../../notes.csv"),
        ("callbacks.metrics_csv.path", "RUNning/notes.csv"),
        ("callbacks.step_checkpoint.dirpath", "checkpoints"),
        ("callbacks.checkpoint.filename", "../../x"),
        ("callbacks.recall.path", "RUN/link/recall.csv"),
        ("logger.tensorboard.save_dir", "/srv"),
        ("logger.tensorboard.name", "../.."),
        ("logger.mlflow.tracking_uri", "http://example.org"),
        ("logger.mlflow.artifact_location", "file:/srv"),
        ("trainer.default_root_dir", "/srv"),
        ("trainer.profiler", {"dirpath": "/srv"}),
        ("trainer.plugins", [{"save_dir": "/srv"}]),
        ("trainer.profiler", {"_args_": ["/srv", "profile"]}),
        ("callbacks.samples.names", ["notes", "../../notes"]),
        ("strategy.config", {"csv_monitor": {"output_path": "logs"}}),
        ("strategy.config", {"offload": {"nvme_path": "/srv"}}),
        ("data.cache_dir", "/srv"),
        ("data", {"_target_": "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule", "data_dir": "/srv"}),
        ("table.file", "rows.bin"),
    ],
)
def test_a_place_outside_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(tmp_path)
    value = value.replace("RUN", str(run)) if isinstance(value, str) else value
    with pytest.raises(ConfigError, match=rf"config\.yaml names {key}.*outside of .*trust_config=true"):
        check_places(saved(run, **{key: value}), "config.yaml", run, allowed=["~/c"])


@pytest.mark.parametrize(
    ("own", "command", "expected"),
    [("/old", "/new", "/new"), ("RUN/cache", "/new", "RUN/cache"), ("RUN/../c", "~/c", "~/c"), ("/old", None, "/old")],
)
def test_the_cache_is_that_of_the_command(tmp_path: Path, own: str, command: str | None, expected: str) -> None:
    own, expected = own.replace("RUN", str(tmp_path)), expected.replace("RUN", str(tmp_path))
    config = with_own_cache(saved(tmp_path, **{"data.cache_dir": own}), tmp_path, command)
    assert config == saved(tmp_path, **{"data.cache_dir": expected})


def test_links_lead_out_at_any_depth(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "latest").symlink_to(run / "checkpoints")
    check_links(run)
    (run / "checkpoints" / "step.ckpt").symlink_to("../../elsewhere")
    with pytest.raises(ConfigError, match=r"checkpoints/step\.ckpt is a link .*elsewhere.*trust_config=true"):
        check_links(run)


@pytest.mark.parametrize(
    ("name", "is_taken"),
    [
        ("wandb/offline-run-20261130_012738-4zwhwn1j/logs/debug-core.log", True),
        ("wandb/offline-run-20261130_012738-4zwhwn1j/logs/debug.log", False),
        ("wandb/logs/debug-core.log", False),
        ("wandb", False),
    ],
)
def test_the_log_that_wandb_links_in_its_folders_may_lie_elsewhere(tmp_path: Path, name: str, is_taken: bool) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(tmp_path)
    with contextlib.nullcontext() if is_taken else pytest.raises(ConfigError, match="is a link that leads out"):
        check_links(run)
