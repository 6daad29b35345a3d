"""`export quantize=`: sizes, verbs that read the file from memory and mapped, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL_RUN, Run

from pkm_lightning.ops import dequantize_rows
from pkm_lightning.ops.quantized_rows import QuantizedRows

PROMPTS = 'data.prompts=["The capital of France is","Who"]'
CODES = "table._target_=pkm_lightning.memory.QuantizedTable"


def test_a_quantised_export_answers_as_the_model_with_its_values(cli: Run, trained: Path) -> None:
    checkpoint = next((trained / "checkpoints").iterdir())
    shown = cli("export", "run_dir=run", "file=model.safetensors", "quantize=int4")
    assert shown.code == 0, shown.err
    # 256 rows of 64 values: 32 bytes of codes and two scales each.
    assert "value tables as int4: 9,216 bytes, before 65,536" in shown.out
    parts = load_file("model.safetensors")
    values_NV = dequantize_rows(QuantizedRows(parts["tables.0.codes"], parts["tables.0.scales"], 4, 64))
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.tables.0.weight"] = values_NV
    torch.save(content, "values.ckpt")

    answers = []
    for form in (["ckpt=values.ckpt"], ["ckpt=model.safetensors"], ["ckpt=model.safetensors", "table.device=mmap"]):
        shown = cli("predict", *form, PROMPTS, "out=answers.jsonl")
        assert shown.code == 0, shown.err
        answers.append([json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 2
    losses = []
    for device in ("cpu", "mmap"):
        shown = cli("validate", "ckpt=model.safetensors", f"table.device={device}", "~callbacks.recall")
        assert shown.code == 0, shown.err
        losses.append([line for line in shown.out.splitlines() if "val/" in line])
    assert losses[0] == losses[1] != []
    # Other precisions cast neither codes nor scales, so that they read a mapped table as well.
    assert (
        cli("predict", "ckpt=model.safetensors", PROMPTS, "table.device=mmap", "trainer.precision=bf16-true").code == 0
    )

    raw = bytearray(Path("model.safetensors").read_bytes())
    raw[-3] ^= 1  # of the codes, which are last
    Path("damaged.safetensors").write_bytes(raw)
    refused = cli("predict", "ckpt=damaged.safetensors", PROMPTS)
    assert refused.code == 2
    assert "damaged.safetensors is damaged (tables.0.codes has changed since it was written)" in refused.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["export", "run_dir=run", "file=a.safetensors", "quantize=int5"],
            "quantize='int5' is not known; allowed: int8,",
        ),
        (["export", "run_dir=run", "file=a.safetensors", "quantize=4"], "quantize='4' is not known; allowed: int8,"),
        (
            ["fit", *SMALL_RUN, "run_dir=new", CODES, "+table.bits=4", "~table.learning"],
            "table.bits=4: a quantised table is read only and cannot be trained; train with table._target_=",
        ),
        (
            ["fit", *SMALL_RUN, "run_dir=new", CODES, "+table.bits=3", "~table.learning"],
            "table.bits=3",
        ),
    ],
)
def test_what_is_refused_leaves_nothing(cli: Run, trained: Path, arguments: list[str], reason: str) -> None:
    shown = cli(*arguments)
    assert shown.code == 2
    assert reason in shown.err
    assert len(shown.err.splitlines()) == 1
    assert [entry.name for entry in Path.cwd().iterdir()] == ["run"]
