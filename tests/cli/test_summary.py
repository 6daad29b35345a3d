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
    monkeypatch.setattr(summary, "_figures", lambda record, counts: text)
    summary.print_summary({}, [recall], ParameterCounts(trained=1, frozen=0))
    figures, *lines = capsys.readouterr().out.splitlines()
    assert figures == text
    assert next(line for line in lines if text in line).count(text) == 3


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], None),
        (["table.trainable=false"], "parameters trained / frozen"),
        (["optim.freeze=[embedding*]"], "parameters trained / frozen"),
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
