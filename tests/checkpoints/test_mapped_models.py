"""Whole models whose tables stay in an exported file compute what they compute from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import config

from pkm_lightning.checkpoints import SavedCheckpoint, open_checkpoint
from pkm_lightning.checkpoints.export import write
from pkm_lightning.memory import ValueTable
from pkm_lightning.training import LanguageModule

FFNS = {
    "memory_plus": [],
    "pkm": ["ffn.cures.simvq=true"],
    "peer": [],
    "ultramem": ["table.learning=dense"],
    "ultramem_v2": [],
    "engram": ["ffn.rows=20"],
    "ple": [],
    "stem": [],
}


def module(settings: dict[str, Any]) -> LanguageModule:
    made = LanguageModule(settings)
    made.configure_model()
    return made.eval()


@pytest.mark.parametrize("ffn", FFNS)
def test_every_memory_reads_mapped_tables(ffn: str, tmp_path: Path) -> None:
    overrides = [f"ffn={ffn}", *FFNS[ffn], "model.memory.n_keys=16"]
    saved = config(*overrides)
    trained = module(saved)
    content = {"state_dict": trained.state_dict(), "tokens_seen": 0, "hyper_parameters": {"config": saved}}
    torch.save(content, tmp_path / "a.ckpt")
    write(SavedCheckpoint(tmp_path / "a.ckpt"), tmp_path / "a.safetensors")
    mapped = module(config(*overrides, "table.device=mmap"))
    mapped.load_state_dict(open_checkpoint(tmp_path / "a.safetensors").map()["state_dict"])
    tables = [part for part in mapped.to("cpu").modules() if isinstance(part, ValueTable)]
    assert tables
    assert all(table.is_mapped and not table.weight.is_meta for table in tables)
    batch = {"input_ids": torch.randint(0, 50, (2, 9))}
    with torch.inference_mode():
        assert torch.equal(mapped(batch).hidden_BTD, trained(batch).hidden_BTD)
