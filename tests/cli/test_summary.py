"""The screen at the end of a run shows prompts and answers as they are."""

from __future__ import annotations

import math

import pytest
from small import resolved

from pkm_lightning.build.freezing import ParameterCounts, parameter_counts
from pkm_lightning.callbacks import Recall
from pkm_lightning.cli import summary
from pkm_lightning.inference.recall import ItemScore
from pkm_lightning.training.record import start_record


@pytest.mark.parametrize("text", ["[/INST] [/red] b", "[bold]x[/bold]", "[link=x", ":smile:", "\\[x]", "[]", "[/]"])
def test_brackets_in_data_are_no_markup(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = dict.fromkeys(ItemScore.__dataclass_fields__, math.nan)
    fields |= {"prompt": text, "answer": text, "truth": text, "form": "validation", "relation": "x", "exact": True}
    recall = Recall(val_items=0, test_items=0)
    recall.scores = [ItemScore(**fields)]
    monkeypatch.setattr(summary, "_figures", lambda *_: text)
    summary.print_summary({}, [recall], ParameterCounts(trained=1, frozen=0))
    figures, *lines = capsys.readouterr().out.splitlines()
    assert figures == text
    assert next(line for line in lines if text in line).count(text) == 3


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], None),
        (["table.trainable=false"], "parameters that may learn / frozen"),
        (["optim.freeze=[embedding*]"], "parameters that may learn / frozen"),
    ],
)
def test_parameters_that_do_not_learn_are_shown(
    overrides: list[str], shown: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resolved(*overrides)
    record = start_record(run.config, run.cost, run.of_variants)
    counts = parameter_counts(run.model)
    summary.print_summary({**record, "metrics": {}}, [], counts)
    lines = [line for line in capsys.readouterr().out.splitlines() if "frozen" in line]
    assert len(lines) == (shown is not None)
    assert all(shown and shown in line and f"{counts.trained:,} / {counts.frozen:,}" in line for line in lines)


@pytest.mark.parametrize(("layers", "shown"), [([2], "layer 2"), ([1, 4], "layers 1, 4"), ([], "layers none")])
def test_one_layer_is_in_the_singular(layers: list[int], shown: str) -> None:
    flops = {"train": 3, "decode": 1}
    figures = {"class": "STEM", "mode": "after", "tables": [], "params": {"total": 2, "active": 1}}
    figures |= {"flops_per_token": flops, "layers": layers}
    rows = dict(summary.variant_rows({"ffn": figures, "stem": figures}))
    assert rows["stem"] == f"STEM, after, {shown}, no table"


def test_shares_of_few_questions_say_how_many_and_one_figure_is_shown_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = resolved("ffn=dense")
    record = start_record(run.config, run.cost, run.of_variants)
    recall = {"validation": {"recall": 0.25, "n": 12}, "seen": {"recall": 0.5, "choice": 0.75, "n": 400}}
    for validation, lines in ((2.0, ["held-out text"]), (3.0, ["held-out text", "validations"])):
        metrics = {"recall": recall, "test/perplexity": 2.0, "val/perplexity": validation}
        summary.print_summary({**record, "metrics": metrics}, [], parameter_counts(run.model))
        shown = capsys.readouterr().out
        assert "25.0% (12 questions)" in shown
        assert "50.0%, 75.0% of four options " in shown
        assert [line.split("perplexity of ")[1][: len(lines[0]) + 3].strip(" \u2502") for line in shown.splitlines()
                if "perplexity" in line] == lines  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (
            {"learned_seen": 0.02, "known_question": 0.97, "known_loss": 1.5, "known_kl": 0.0},
            {"learned_seen": 0.84, "known_question": 0.5, "known_loss": 2.25, "known_kl": 0.3, "bytes_changed": 4.0}
            | {"known_question_change": -0.47, "known_loss_change": 0.75},
            [("learned", "seen 2.0% -> 84.0%"), ("known before", "question 97.0% -> 50.0%, loss 1.500 -> 2.250")],
        ),
        ({}, {"learned_seen": 1.0}, [("learned", "seen 100.0%")]),
        ({"known_loss": 1.0}, {"known_loss": 1.0}, [("known before", "loss 1.000 -> 1.000")]),
        ({}, {"bytes_changed": 4.0}, []),
    ],
)
def test_learned_and_known_are_shown_before_and_after(
    before: dict[str, float], after: dict[str, float], shown: list[tuple[str, str]]
) -> None:
    assert summary.retention_rows(before, after) == shown
