"""Retention: what is learned and what is lost, against figures computed by hand, and the same after a resume."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL_RUN, Run
from torch.nn import functional

import pkm_lightning
from pkm_lightning.adaptation.facts_file import read_facts
from pkm_lightning.adaptation.questions import exact_answers, questions_about
from pkm_lightning.adaptation.retention import (
    bytes_changed,
    parameter_digests,
    report_unmeasured,
    row_digests,
)
from pkm_lightning.callbacks import Retention
from pkm_lightning.data.facts.invented import InventedChoice
from pkm_lightning.data.facts.invented_files import write_invented
from pkm_lightning.data.held_out import held_out_batches
from pkm_lightning.errors import ConfigError, DataError, PkmError

STEPS = [
    *("callbacks=[default,retention]", "~callbacks.progress_bar", "~callbacks.samples", "~callbacks.without_table"),
    *("callbacks.retention.positions=60", "callbacks.retention.items=6", "callbacks.recall.val_items=0"),
    *("callbacks.recall.test_items=0", "logger=none", "trainer.log_every_n_steps=1", "data.seq_len=96"),
    *("init_from=start", "trainer.max_steps=4", "callbacks.step_checkpoint.every_n_steps=2", "optim.lr=1e-2"),
    *("trainer.val_check_interval=2", "data=jsonl", "data.path=facts/train.jsonl", "data.global_batch_size=8"),
]  # fmt: skip


def rows(run: Path) -> list[dict[str, str]]:
    """Returns the rows of validations."""
    with (run / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["val/loss"]]


def fit(cli: Run, *overrides: str) -> str:
    shown = cli("fit", *overrides)
    assert shown.code == 0, shown.err
    return shown.out + shown.err


def start(cli: Run, folder: Path) -> list[str]:
    """Trains a starting run, and returns the overrides of a run that is asked what it learns."""
    fit(
        cli,
        *SMALL_RUN,
        "run_dir=start",
        "data.seq_len=96",
        "trainer.max_steps=4",
        "~callbacks.samples",
        "~callbacks.recall",
    )
    write_invented(InventedChoice(12, 4, 4, 0, 0), folder / "facts")
    facts = "callbacks.retention.facts=facts/facts.jsonl"
    return [*STEPS, facts, "callbacks.retention.questions=[facts/controls.jsonl]"]


def test_figures_are_those_of_the_models(cli: Run, tmp_path: Path) -> None:
    shown = fit(cli, *start(cli, tmp_path), "run_dir=taught")
    assert re.search(r"learned .* seen \d.*% -> ", shown)
    assert "does not measure" not in shown
    before, after = (pkm_lightning.load(tmp_path / name) for name in ("start", "taught"))
    last = rows(tmp_path / "taught")[-1]
    _check_recall(after, last, tmp_path / "facts" / "facts.jsonl")
    _check_loss_and_kl(tmp_path / "start", before, after, last)
    _check_bytes(before, after, last)


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_same_start_and_training_is_the_same(cli: Run, tmp_path: Path) -> None:
    asked = start(cli, tmp_path)
    fit(cli, *asked, "run_dir=taught")
    last = rows(tmp_path / "taught")[-1]
    fit(cli, *asked, "run_dir=parts", "trainer.max_steps=2")
    fit(cli, "run_dir=parts", "trainer.max_steps=4", "resume=always")
    resumed = rows(tmp_path / "parts")[-1]
    for name in ("known_loss", "known_seen"):
        of_start, of_resumed = (float(row[f"val/{name}"]) - float(row[f"val/{name}_change"]) for row in (last, resumed))
        assert of_start == pytest.approx(of_resumed)
    assert float(resumed["val/known_kl"]) > 0
    assert float(resumed["val/bytes_changed"]) > 0
    unasked = fit(cli, *STEPS, "run_dir=unasked", "trainer.max_steps=1", "trainer.val_check_interval=1")
    assert "callbacks.retention does not measure what is learned (set callbacks.retention.facts=FACTS" in unasked
    fit(cli, *[entry for entry in STEPS if "retention" not in entry], "run_dir=plain")
    assert rows(tmp_path / "plain")[-1]["val/loss"] == last["val/loss"]
    (tmp_path / "parts" / "retention.safetensors").unlink()
    lost = cli("fit", "run_dir=parts", "trainer.max_steps=6", "resume=always")
    assert lost.code == 2
    assert "retention.safetensors of the starting model is missing or damaged" in lost.err


def _check_recall(after: Any, last: dict[str, str], facts: Path) -> None:
    items = questions_about(read_facts(facts))
    for form in ("seen", "paraphrase", "question"):
        asked = [item for item in items if item.form == form][:6]
        assert len(asked) == 6
        exact = exact_answers(after.model, after.tokenizer, asked, device=torch.device("cpu"))
        assert float(last[f"val/learned_{form}"]) == pytest.approx(sum(exact) / 6)
    for name in ("learned_controls", "known_seen", "known_paraphrase", "known_paraphrase_change"):
        assert last[f"val/{name}"]


def _check_bytes(before: Any, after: Any, last: dict[str, str]) -> None:
    sizes = differing = 0
    for name, value in after.model.named_parameters():
        old = before.model.get_parameter(name).reshape(len(value), -1)
        differing += int((old != value.reshape(len(value), -1)).any(-1).sum()) * old.shape[1] * 4
        sizes += value.numel() * 4
    assert 0 < differing < sizes
    assert float(last["val/bytes_changed"]) == differing


def _check_loss_and_kl(start: Path, before: Any, after: Any, last: dict[str, str]) -> None:
    """Compares loss and KL with those of the first 60 held-out targets, sequence by sequence."""
    nats, divergence, n = 0.0, 0.0, 0
    start_nats = 0.0
    with torch.no_grad():
        for batch in held_out_batches(start / "heldout", before.tokenizer.pad_id, before.tokenizer.vocab_size):
            p, q = (
                functional.log_softmax(
                    m.model.unembed(m.model(batch["input_ids"], doc_ids_BT=batch["doc_ids"]).hidden_BTD).double(), -1
                )
                for m in (before, after)
            )
            for t in range(batch["labels"].shape[1]):
                label = int(batch["labels"][0, t])
                if label != -100 and n < 60:
                    nats, start_nats, n = nats - float(q[0, t, label]), start_nats - float(p[0, t, label]), n + 1
                    divergence += float((p[0, t].exp() * (p[0, t] - q[0, t])).sum())
    assert n == 60
    assert float(last["val/known_loss"]) == pytest.approx(nats / n, rel=1e-5)
    assert float(last["val/known_loss_change"]) == pytest.approx((nats - start_nats) / n, abs=1e-5)
    assert float(last["val/known_kl"]) == pytest.approx(divergence / n, rel=1e-4)
    assert divergence > 0


def test_a_hash_notices_every_bit_and_counts_the_bytes_of_its_row() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(4).bfloat16()
    before = parameter_digests({"w": weight, "b": bias})
    assert row_digests(weight).shape == (5,)
    changed = weight.clone()
    changed.view(torch.int32)[3, 1] ^= 1
    assert (row_digests(changed) != before["w"]).tolist() == [False, False, False, True, False]
    assert bytes_changed({"w": changed, "b": bias}, before) == 12
    assert bytes_changed({"w": weight, "b": bias + 1, "new": torch.zeros(2, 2)}, before) == 8 + 16
    assert bytes_changed({"w": weight.clone(), "b": bias}, before) == 0


@pytest.mark.parametrize(
    ("contents", "missing"),
    [
        (([], [1], [1]), ["what is learned (set callbacks.retention.facts="]),
        (([1], [], [1]), ["answers to what was known (set callbacks.retention.known="]),
        (([], [1], []), ["what is learned", "loss and KL on other text (set callbacks.retention.text=FILE)"]),
        (([1], [1], [1]), []),
    ],
)
def test_what_is_not_measured_is_logged(
    contents: tuple[list[int], ...], missing: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    report_unmeasured("callbacks.retention", *contents)
    assert len(caplog.messages) == bool(missing)
    assert all(text in caplog.messages[0] for text in missing)
    assert not missing or caplog.messages[0].count("(set ") == len(missing)


def arguments(**changes: Any) -> dict[str, Any]:
    usual = {"facts": None, "questions": [], "known": None, "text": None, "items": 2, "positions": 2, "path": "x"}
    return {**usual, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"items": 0}, ConfigError, "callbacks.retention.items=0 is out of range"),
        ({"positions": 0}, ConfigError, "callbacks.retention.positions=0 is out of range"),
        ({"facts": "none.jsonl"}, DataError, "callbacks.retention.facts=none.jsonl"),
        ({"questions": ["none.jsonl"]}, DataError, "callbacks.retention.questions=none.jsonl"),
        ({"known": "nowhere"}, PkmError, "callbacks.retention.known=nowhere does not exist"),
        ({"text": "none.txt"}, DataError, "callbacks.retention.text=none.txt"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as refused:
        Retention(**arguments(**changes)).setup(None, None, "fit")  # type: ignore[arg-type]
    assert message in str(refused.value)
