"""A user's own FFN and data: one Python file and one YAML each in a --config-dir, and nothing of the package edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import SMALL_RUN, Run

FFN = """
import torch
from pkm_lightning.ffn import FFNOutput

class Toy(torch.nn.Module):
    def __init__(self, dim, width=8):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(dim, width), torch.nn.Linear(width, dim)

    def forward(self, x_BTD, context):
        return FFNOutput(self.outer(self.inner(x_BTD).relu()))
"""
DATA = """
import lightning as L
import torch

class Toy(L.LightningDataModule):
    vocab_size = 32

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def _loader(self):
        ids = torch.arange(self.rows * 9).reshape(self.rows, 9) % 32
        return torch.utils.data.DataLoader([{"input_ids": r[:-1], "labels": r[1:]} for r in ids], batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = _loader
"""
RUN = [o for o in SMALL_RUN if not o.startswith("data.")]


@pytest.fixture
def plugin_dir(tmp_path: Path) -> Path:
    (tmp_path / "toy_ffn.py").write_text(FFN)
    (tmp_path / "toy_data.py").write_text(DATA)
    for group, target in (("ffn", "toy_ffn.Toy\nwidth: 5"), ("data", "toy_data.Toy\nrows: 40")):
        folder = tmp_path / "mine" / group
        folder.mkdir(parents=True)
        (folder / "toy.yaml").write_text(f"_target_: {target}\n")
    return tmp_path


def test_both_train_from_a_config_dir_and_the_saved_run_needs_trust(cli: Run, plugin_dir: Path) -> None:
    shown = cli("fit", "--config-dir=mine", *RUN, "ffn=toy", "data=toy", "run_dir=run")
    assert shown.code == 0, shown.err
    record = json.loads((plugin_dir / "run" / "run.json").read_text())
    assert record["ffn"] == "Toy"
    assert record["unknown_cost"] == ["Toy"]
    assert "without the cost of" in shown.out
    assert record["metrics"]["test/perplexity"] < 32
    refused = cli("test", "run_dir=run")
    assert refused.code == 2
    assert "toy_ffn.Toy" in refused.err or "toy_data.Toy" in refused.err
    assert "trust_config=true" in refused.err
    assert cli("test", "run_dir=run", "trust_config=true").code == 0


def test_labels_that_were_not_shifted_are_refused(cli: Run, plugin_dir: Path) -> None:
    (plugin_dir / "toy_data.py").write_text(DATA.replace("r[1:]", "r[:-1]"))
    shown = cli("fit", "--config-dir=mine", *RUN, "ffn=toy", "data=toy", "run_dir=run")
    assert shown.code == 2
    assert "labels equal input_ids" in shown.err


def test_ids_outside_the_vocabulary_are_refused(cli: Run, plugin_dir: Path) -> None:
    (plugin_dir / "toy_data.py").write_text(DATA.replace("vocab_size = 32", "vocab_size = 20"))
    shown = cli("fit", "--config-dir=mine", *RUN, "ffn=toy", "data=toy", "run_dir=run")
    assert shown.code == 2
    assert "model.vocab_size=20" in shown.err


def test_data_without_a_test_set_is_validated_instead(cli: Run, plugin_dir: Path) -> None:
    """Both named on the command line, without a YAML of their own."""
    (plugin_dir / "toy_data.py").write_text(DATA.replace(" = test_dataloader", ""))
    shown = cli(
        "fit", *RUN, "ffn=custom", "ffn._target_=toy_ffn.Toy", "data=custom", "data._target_=toy_data.Toy",
        "+data.rows=40", "run_dir=run", "trainer.max_steps=4",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert json.loads((plugin_dir / "run" / "run.json").read_text())["metrics"]["val/loss"] > 0
    refused = cli("test", "run_dir=run", "trust_config=true")
    assert refused.code == 2
    assert "test reads test_dataloader(), which the data module Toy does not have; add it." in refused.err


def test_data_without_batches_is_a_failure(cli: Run, plugin_dir: Path) -> None:
    shown = cli("fit", "--config-dir=mine", *RUN, "ffn=toy", "data=toy", "data.rows=0", "run_dir=run")
    assert shown.code == 2
    assert "no training step was taken" in shown.err


SMALL_TEXT = ["data.vocab_size=280", "data.seq_len=32", "data.global_batch_size=4", "trainer.max_steps=4"]


def test_jsonl_and_text_train(cli: Run, tmp_path: Path) -> None:
    sums = [(f"{a} plus {b} is", str(a + b)) for a in range(20) for b in range(20)]
    records = [{"prompt": prompt, "answer": answer} for prompt, answer in sums]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    texts = [{"text": " ".join(pair)} for pair in sums]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
    (tmp_path / "prose.txt").write_text(" ".join(f"{prompt} {answer}." for prompt, answer in sums))
    for kind, path in (("jsonl", "sums.jsonl"), ("jsonl", "plain.jsonl"), ("text", "prose.txt")):
        shown = cli("fit", *RUN, f"data={kind}", f"data.path={path}", *SMALL_TEXT, f"run_dir=of-{path}")
        assert shown.code == 0, shown.err
        assert "perplexity of held-out text" in shown.out
        assert ("recall" in shown.out) == (path == "sums.jsonl")
    answered = cli("predict", "run_dir=of-sums.jsonl", "data.prompts=[2 plus 2 is]")
    assert answered.code == 0, answered.err
    answers = (tmp_path / "of-sums.jsonl" / "predictions.jsonl").read_text()
    assert json.loads(answers)["prompt"] == "2 plus 2 is"


def test_weights_are_not_read_with_another_tokenizer(cli: Run, tmp_path: Path) -> None:
    """Else every token id would mean another word."""
    (tmp_path / "prose.txt").write_text("the quick brown fox jumps over the lazy dog " * 80)
    assert cli("fit", *RUN, "data=text", "data.path=prose.txt", *SMALL_TEXT, "run_dir=run").code == 0
    for verb, extra in (("test", []), ("predict", ["data.prompts=[the quick]"])):
        shown = cli(verb, "run_dir=run", "data.tokenizer=bytes", *extra)
        assert shown.code == 2
        assert "tokenizer is not the one" in shown.err
