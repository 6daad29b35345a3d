"""Decoding with a cache writes what full forwards write: every plugin, placement, precision and place of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ffn.drawn_weights import draw
from ffn.plugin_contract import Case, ids, run
from ffn.test_every_plugin import CHANGES, NAMES
from model.cached_decoding import check_cached_decoding

from pkm_lightning.build.loading import load
from pkm_lightning.build.model import build_model
from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.export import write as export
from pkm_lightning.ffn import HasAfterStep
from pkm_lightning.model import Transformer
from pkm_lightning.model.block import named_plugins
from pkm_lightning.model.plugin_outputs import plugin_entries

PLACEMENTS = {
    "replace": {},
    "parallel": {"mode": "parallel"},
    "before": {"mode": "before", "write_after": 0},
    "after": {"mode": "after", "write_after": 0},
    "deferred": {"mode": "parallel", "layers": [0, 1], "write_after": 1},
}


def trained(name: str, placement: str) -> tuple[Transformer, dict[str, Any]]:
    """Builds the plugin's small model; a training forward has moved its statistics, as those of batch norms."""
    settings = Case(name, CHANGES.get(name, {})).settings()
    settings["model"]["n_layers"] = 3
    settings["placement"] |= PLACEMENTS[placement]
    model = build_model(settings)
    draw(model)
    with torch.no_grad():
        output = run(model.train(), ids(6, 9))
    for layer, stats in output.step_stats.items():
        for key, plugin in named_plugins(model.blocks[layer]):  # type: ignore[arg-type]
            if isinstance(plugin, HasAfterStep):
                plugin.after_step(plugin_entries(key, stats))
    return model.eval(), settings


@pytest.mark.parametrize("steps", [16, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_every_plugin_writes_as_in_a_full_forward(name: str, steps: int) -> None:
    check_cached_decoding(trained(name, "replace")[0], steps=steps)


# Blocks place plugins alike: a memory, a plugin with a cache and one without a table stand for the others, and where
# the output is written later one with a table of several parts.
ELSEWHERE = [
    pytest.param(
        *(name, placement),
        marks=()
        if name in ("memory_plus", "engram", "moe") or (name, placement) == ("ultramem", "deferred")
        else pytest.mark.slow,
    )
    for name in NAMES
    for placement in PLACEMENTS
    if placement != "replace"
]


@pytest.mark.parametrize(("name", "placement"), ELSEWHERE)
def test_every_placement(name: str, placement: str) -> None:
    check_cached_decoding(trained(name, placement)[0], steps=12)


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str) -> None:
    check_cached_decoding(trained(name, "replace")[0].to(torch.bfloat16), steps=12)


# Sums, inner products and single rows of a table in host memory; all plugins with one in its file.
@pytest.mark.parametrize(
    ("name", "table_device"),
    [(name, "cpu") for name in ("memory_plus", "peer", "engram")]
    + [
        (n, "mmap")
        for n in ("pkm", "memory", "memory_plus", "peer", "ultramem", "ultramem_v2", "engram", "ple", "stem")
    ],
)
def test_tables_in_host_memory_and_in_their_file(name: str, table_device: str, tmp_path: Path) -> None:
    model, settings = trained(name, "replace")
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "tokens_seen": 0, "hyper_parameters": {"config": settings}}, tmp_path / "a.ckpt")
    export(SavedCheckpoint(tmp_path / "a.ckpt"), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", table_device=table_device).model
    assert loaded.value_tables
    assert all(table.is_mapped is (table_device == "mmap") for table in loaded.value_tables)
    check_cached_decoding(loaded, steps=8)
