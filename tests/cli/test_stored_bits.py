"""A run on biographies: the bits that it records are those of its probabilities, also of its exports at fewer bits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from small import Run, record, rows
from tolerances import VALUE

import pkm_lightning
from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.data.held_out import HELD_OUT, held_out_batches
from pkm_lightning.inference.likelihood import Continuation, score

REL, _ = VALUE[torch.float32]
FIT = [
    *("fit", "run_dir=run", "experiment=capacity", "ffn=memory_plus", "match=none", "model.memory.n_keys=8"),
    *(
        "data.people=40",
        "data.words=8",
        "data.attributes=3",
        "data.seq_len=13",
        "data.exposures=6",
        "data.eval_people=16",
    ),
    *(
        "data.global_batch_size=16",
        "trainer.log_every_n_steps=5",
        "trainer.val_check_interval=5",
        "~callbacks.progress_bar",
        "logger=none",
    ),
]


def bits_per_person(run: Path) -> float:
    """Scores each name and value of the validation part by itself, from the weights and the sequences of the run."""
    loaded = pkm_lightning.load(run)
    tokenizer = loaded.tokenizer
    parts, n_people = [], 0
    for batch in held_out_batches(run / HELD_OUT, tokenizer.pad_id, tokenizer.vocab_size):
        ids, labels = [*batch["input_ids"][0].tolist(), tokenizer.eos_id], batch["labels"][0].tolist()
        targets = [t + 1 for t, label in enumerate(labels) if label != NO_TARGET]
        parts += [
            Continuation(tuple(ids[: end + 1]), n) for end, n in ((targets[2], 3), *((t, 2) for t in targets[4::2]))
        ]
        n_people += 1
    nats = -sum(part.nats for part in score(loaded.model, parts, device=loaded.device, batch_size=64))
    assert (len(parts), n_people) == (16, 4)
    return 9 + 3 * 6 - nats / n_people / math.log(2)


def test_the_bits_of_a_run_and_of_its_exports(cli: Run) -> None:
    shown = cli(*FIT)
    assert shown.code == 0, shown.err
    assert "bits stored, of all there are" in shown.out
    run = Path("run")
    content = record(run)
    metrics, cost = content["metrics"], content["params"]
    assert content["tokens"] == 40 * 6 * 13
    validated = [float(row["val/bits_person"]) for row in rows(run) if row["val/bits_person"]]
    assert validated[-1] == pytest.approx(bits_per_person(run), rel=REL)
    stored = metrics["test/stored_bits"]
    assert stored == pytest.approx(40 * metrics["test/bits_person"], rel=REL)
    assert metrics["test/bits_per_parameter"] == pytest.approx(stored / cost["total"], rel=REL)
    assert metrics["test/bits_per_active_parameter"] == pytest.approx(stored / cost["active"], rel=REL)
    assert metrics["test/bits_per_byte"] == pytest.approx(stored / cost["total"] / 4, rel=REL)
    # 64 rows of 32 values: codes and one scale per row in the place of 128 bytes.
    assert metrics["test/weight_bytes_int8"] == 4 * cost["total"] - 64 * (128 - 32 - 2)
    assert metrics["test/weight_bytes_int4_all"] < metrics["test/weight_bytes_int8_all"] < cost["total"] * 1.2

    assert cli("export", "run_dir=run", "file=int4.safetensors", "quantize=int4").code == 0
    shown = cli("test", "ckpt=int4.safetensors")
    assert shown.code == 0, shown.err
    tested = {name: float(value) for name, value in re.findall(r"(test/\S+)\s+\S?\s*(-?[\d.]+)", shown.out)}
    # What was rounded before has been restored: int4 came last but for all matrices.
    for name in ("bits_person", "weight_bytes", "bits_per_byte"):
        assert tested[f"test/{name}"] == pytest.approx(metrics[f"test/{name}_int4"], abs=1e-4), name
    # Tables that are rounded already are not rounded once more; other matrices are.
    assert "test/bits_person_int8" not in tested
    assert tested["test/weight_bytes_int8_all"] < tested["test/weight_bytes"]
