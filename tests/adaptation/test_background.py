"""Read backgrounds: counts against a recount by hand, files, and what is refused.

Letters: B sequences, T tokens, D model dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import config

from pkm_lightning import Engram, MemoryPlus, ValueTable
from pkm_lightning.adaptation import ReadBackground, measure_background
from pkm_lightning.adaptation.background_text import share_of_rank
from pkm_lightning.build.model import build_model
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import FFNContext

D, ROWS = 8, 64


def transformer(*overrides: str) -> Any:
    torch.manual_seed(1)
    model = build_model(config("model.memory.n_keys=8", "placement=all", *overrides))
    model.init_weights(1)
    return model


def batches() -> list[dict[str, Tensor]]:
    """Sequences of which some end with padding, one of them after the first token."""
    torch.manual_seed(5)
    valid_BT = torch.arange(6) < torch.tensor([6, 1, 4])[:, None]
    return [{"input_ids": torch.randint(50, (3, 6)), "valid": valid_BT} for _ in range(2)]


def recount(model: Any, given: list[dict[str, Tensor]], by: str) -> tuple[list[int], list[int]]:
    """Returns in how many units each row of `table0` was read, and how often, from the traces of the plugins."""
    units: list[list[int]] = []
    for batch in given:
        traces = model.eval()(batch["input_ids"], valid_BT=batch["valid"], observe=True).traces
        of_batch = [
            [int(i) for t in traces.values() for i in t["slot_ids"][b][batch["valid"][b]].flatten()] for b in range(3)
        ]
        units += of_batch if by == "sequence" else [[i for part in of_batch for i in part]]
    rows = model.tables[0].rows
    return (
        [sum(row in unit for unit in units) for row in range(rows)],
        [sum(unit.count(row) for unit in units) for row in range(rows)],
    )


@pytest.mark.parametrize("by", ["sequence", "batch"])
def test_counts_of_a_transformer_are_those_of_its_traces(by: Any) -> None:
    model = transformer()
    given = batches()
    model.train()
    background = measure_background(model, given, by=by)
    assert model.training
    assert background.n_batches == (6 if by == "sequence" else 2)
    in_batches, reads = recount(model, given, by)
    assert background.batches["table0"].tolist() == in_batches
    assert background.reads["table0"].tolist() == reads
    assert 0 < sum(reads) == int(sum(b["valid"].sum() for b in given)) * 3 * 32  # layers, heads, reads per head


class Pair(nn.Module):
    """A token-addressed and a product-key memory in a module that is no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, D)
        rows = ValueTable(rows=ROWS, dim=D, learning="rows")
        self.memory = MemoryPlus(dim=D, n_keys=8, heads=1, knn=2, table=rows)
        self.engram = Engram(dim=D, vocab_size=50, rows=20, heads=1, row_dim=4, end_id=0)

    def forward(self, input_ids: Tensor) -> Tensor:
        context = FFNContext(input_ids)
        x_BTD = self.embedding(input_ids)
        x_BTD = x_BTD + self.engram(x_BTD, context).y_BTD
        y_BTD: Tensor = self.memory(x_BTD, context).y_BTD
        return y_BTD


def test_any_module_and_several_tables_are_counted_and_a_file_holds_all(tmp_path: Path) -> None:
    model = Pair()
    background = measure_background(model, torch.randint(50, (3, 4, 5)))
    assert background.n_batches == 12
    assert list(background.batches) == ["table0", "table1"]
    assert int(background.reads["table0"].sum()) == 12 * 5 * 2
    assert int(background.reads["table1"].sum()) == 12 * 5 * model.engram.addressing.reads
    loaded = ReadBackground.load(background.save(tmp_path / "background.safetensors"))
    assert loaded.n_batches == 12
    for name in background.batches:
        assert torch.equal(loaded.batches[name], background.batches[name])
        assert torch.equal(loaded.reads[name], background.reads[name])
    assert not model.memory._forward_hooks


def test_what_is_no_background_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "background.safetensors"
    with pytest.raises(CheckpointError, match=r"^finetune.background=.*safetensors cannot be read"):
        ReadBackground.load(path, "finetune.background=")
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged or no file of this kind"):
        ReadBackground.load(path)
    background = ReadBackground(1, {"table0": torch.ones(9)}, {"table0": torch.ones(9)})
    background.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        ReadBackground.load(path)
    with pytest.raises(ConfigError, match=r"counts the reads of table0 \(9 rows\), but .* are table0 \(64 rows\)"):
        background.check({"table0": 64}, "finetune.background")
    with pytest.raises(ConfigError, match="Linear has no memory layer"):
        measure_background(nn.Linear(2, 2), [])


def test_ranks_share_sequences_in_equal_numbers() -> None:
    sequences = [[n] for n in range(21)]
    shares = [[int(row) for batch in share_of_rank(sequences, rank, 2) for row in batch] for rank in range(2)]
    assert shares == [list(range(0, 20, 2)), list(range(1, 20, 2))]
