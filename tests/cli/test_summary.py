"""The screen at the end of a run shows prompts and answers as they are."""

from __future__ import annotations

import math

import pytest

from pkm_lightning.build.freezing import ParameterCounts
from pkm_lightning.callbacks import Recall
from pkm_lightning.cli import summary
from pkm_lightning.inference.recall import ItemScore


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
