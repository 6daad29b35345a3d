"""SparseUpdates in a plain loop over a module that is no transformer: what is counted, what learns, what is refused.

Letters: B sequences, T positions, D model dimension, S sub-keys per half, N rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adaptation.plain_scores import plain_choice, plain_scores
from pages import blocks
from torch import Tensor, nn
from tree import ROOT

from pkm_lightning import MemoryPlus, ReadBackground, SparseUpdates, TableOptimizer, ValueTable, row_learning_tables
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.ffn import NO_CONTEXT, replaced
from pkm_lightning.memory import clip_tables

D, S, ROWS = 8, 8, 4
BACKGROUND = ReadBackground(6, {"table0": torch.arange(S**2) % 7}, {"table0": torch.arange(S**2) % 7 * 3})


class Twice(nn.Module):
    """Two memories that share a table, in evaluation mode, with all else frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        table = ValueTable(rows=S**2, dim=D, learning="rows")
        self.layers = nn.ModuleList(MemoryPlus(dim=D, n_keys=S, heads=2, knn=2, table=table) for _ in range(2))
        self.table = table
        self.requires_grad_(False).eval()

    def forward(self, x_BTD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTD = x_BTD + layer(x_BTD).y_BTD
        return x_BTD

    def reads(self, x_BTD: Tensor) -> list[int]:
        """Returns how often each row is read in a forward."""
        counts, context = [0] * S**2, replaced(NO_CONTEXT, observe=True)
        with torch.no_grad():
            for layer in self.layers:
                output = layer(x_BTD, context)
                x_BTD = x_BTD + output.y_BTD
                for slot in output.trace["slot_ids"].flatten().tolist():
                    counts[slot] += 1
        return counts


def setting(**options: Any) -> tuple[Twice, TableOptimizer, SparseUpdates]:
    model = Twice()
    optimizer = TableOptimizer(None, row_learning_tables(model), rows="sgd", lr=0.5)
    return model, optimizer, SparseUpdates(model, optimizer, rows=ROWS, **{"background": BACKGROUND, **options})


def formula(counts: list[int]) -> list[int]:
    known = BACKGROUND.of("table0")
    return plain_choice(plain_scores(counts, "tfidf", 6, known.batches_N.tolist(), known.reads_N.tolist()), ROWS)


def changed(table: ValueTable, before_NV: Tensor) -> list[int]:
    return (table.weight != before_NV).any(-1).nonzero().flatten().tolist()


def test_a_step_updates_the_rows_of_the_formula_over_its_micro_batches() -> None:
    model, optimizer, updates = setting()
    learned: set[int] = set()
    for _ in range(3):
        micro, before_NV = torch.randn(2, 3, 4, D), model.table.weight.detach().clone()
        counts = [sum(pair) for pair in zip(*(model.reads(x_BTD) for x_BTD in micro), strict=True)]
        for x_BTD in micro:
            model(x_BTD).square().sum().backward()
        with torch.no_grad():
            model(torch.randn(3, 4, D))  # of an evaluation, which is not counted
        optimizer.step()
        optimizer.zero_grad()
        assert changed(model.table, before_NV) == sorted(formula(counts))
        learned |= set(formula(counts))
    assert updates.report() == {"table0": (len(learned), S**2, len(learned) * D * 4)}


def test_a_loop_that_clips_chooses_first() -> None:
    model, optimizer, updates = setting()
    x_BTD = torch.randn(3, 4, D)
    model(x_BTD).square().sum().backward()
    updates.choose()
    assert updates.figures()["table0/chosen_share"] == ROWS / S**2
    norm = clip_tables([model.table], [], None)
    before_NV = model.table.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close((before_NV - model.table.weight).norm(), norm * 0.5)


def test_rows_of_a_task_stay_chosen_and_a_state_restores_them() -> None:
    model, optimizer, updates = setting()
    task = [torch.randn(3, 4, D) for _ in range(2)]
    rows = sorted(formula([sum(pair) for pair in zip(*(model.reads(x_BTD) for x_BTD in task), strict=True)]))
    updates.choose_for_task(task, forward=model)
    before_NV = model.table.weight.detach().clone()

    def train(batches: list[Tensor], with_optimizer: TableOptimizer) -> None:
        for x_BTD in batches:
            model(x_BTD).square().sum().backward()
            with_optimizer.step()
            with_optimizer.zero_grad()

    train(task, optimizer)
    assert changed(model.table, before_NV) == rows
    saved = updates.state_dict()
    updates.close()
    before_NV = model.table.weight.detach().clone()
    again = SparseUpdates(model, optimizer, rows=ROWS, background=BACKGROUND)
    again.load_state_dict(saved)
    assert again.report() == updates.report()
    train([torch.randn(30, 9, D)], optimizer)
    assert changed(model.table, before_NV) == rows
    again.close()
    before_NV = model.table.weight.detach().clone()
    train([torch.randn(30, 9, D)], optimizer)
    assert len(changed(model.table, before_NV)) > ROWS


def test_the_program_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(ROOT / "docs" / "finetuning.md", "python")
    names: dict[str, Any] = {}
    exec(program, names)
    assert 100 <= names["updates"].report()["table0"].rows <= 300
    assert (tmp_path / "background.safetensors").exists()


def test_refused() -> None:
    model, optimizer, updates = setting()
    other = ReadBackground(6, {"table0": torch.ones(9)}, {"table0": torch.ones(9)})
    for options, message in (
        ({"rows": 0}, "rows=0"),
        ({"score": "idf"}, r"score='idf' is not known"),
        ({"score": "kl"}, "score=kl compares the reads of a step with those of a background"),
        ({"background": other}, r"table0 \(9 rows\), but the tables of this model are table0 \(64 rows\)"),
    ):
        hooks = len(model.layers[0]._forward_hooks)
        with pytest.raises(ConfigError, match=message):
            SparseUpdates(model, optimizer, **{"background": None, **options})  # type: ignore[arg-type]
        assert len(model.layers[0]._forward_hooks) == hooks
    with pytest.raises(ConfigError, match="no table of this model learns by rows"):
        SparseUpdates(nn.Linear(2, 2), optimizer, score="tf")
    with pytest.raises(CheckpointError, match=r"restricts tables of {'table0': 9} rows"):
        updates.load_state_dict({"changed": {"table0": torch.zeros(9)}, "fixed": {}, "lowest": {}, "step": 0})
