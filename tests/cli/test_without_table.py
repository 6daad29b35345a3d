"""The test without tables: the figures of a model whose tables hold zeros; models without tables have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL_RUN, Run, record

from pkm_lightning.model import Transformer

TEXT = [
    *(option for option in SMALL_RUN if not option.startswith(("data.", "callbacks.recall", "callbacks.samples"))),
    *("data=text", "data.path=prose.txt", "data.vocab_size=270", "data.seq_len=16", "data.global_batch_size=2"),
    *("~callbacks.samples", "trainer.max_steps=4"),
]


def emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every table that is loaded hold zeros from now on."""
    load = Transformer.load_state_dict

    def load_and_empty(model: Transformer, state: Any, **options: Any) -> Any:
        loaded = load(model, state, **options)
        for table in model.value_tables:
            torch.nn.init.zeros_(table.weight)
        return loaded

    monkeypatch.setattr(Transformer, "load_state_dict", load_and_empty)


def check_figures(metrics: dict[str, float], run: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures without tables are those that the command finds where tables hold zeros."""
    without = {name: value for name, value in metrics.items() if name.endswith("_without_table")}
    assert cli("test", f"run_dir={run.name}").code == 0
    assert json.loads((run / "test.json").read_text()).items() >= without.items()
    emptied(monkeypatch)
    assert cli("test", f"run_dir={run.name}").code == 0
    again = json.loads((run / "test.json").read_text())
    assert without == {name: again[name.removesuffix("_without_table")] for name in without}
    assert any(value != metrics[name.removesuffix("_without_table")] for name, value in without.items())


def test_questions_are_asked_once_more_and_the_loss_is_not(
    cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = record(trained)["metrics"]
    forms = metrics["recall"]
    named = {f"test/{name}_{form}" for form in forms for name in ("recall", "choice", "bits") if name in forms[form]}
    assert {name for name in metrics if "without" in name} == {f"{name}_without_table" for name in named}
    check_figures({name: value for name, value in metrics.items() if name != "recall"}, trained, cli, monkeypatch)


def test_where_nothing_is_asked_it_is_the_loss(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    shown = cli("fit", *TEXT, "run_dir=run")
    assert shown.code == 0, shown.err
    metrics = record(tmp_path / "run")["metrics"]
    assert metrics.keys() == {f"test/{name}{end}" for name in ("loss", "perplexity") for end in ("", "_without_table")}
    assert "the same, value tables read as zeros" in shown.out
    check_figures(metrics, tmp_path / "run", cli, monkeypatch)


def test_a_model_without_tables_has_no_such_figure(cli: Run, tmp_path: Path) -> None:
    shown = cli("fit", *SMALL_RUN, "run_dir=run", "ffn=dense", "trainer.max_steps=1", "trainer.val_check_interval=1")
    assert shown.code == 0, shown.err
    assert not [name for name in record(tmp_path / "run")["metrics"] if "without" in name]
    assert "zeros" not in shown.out
