"""What a run remarks about its data before it trains: ids that mean nothing, and how often they are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pkm_lightning.data import TextDataModule


def test_a_run_remarks_ids_without_words_and_how_often_it_reads_its_text(
    text: Callable[..., TextDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def remarks(steps: int, vocab_size: int) -> str:
        data = text(str(tmp_path), vocab_size=vocab_size)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            max_steps=steps, accumulate_grad_batches=1, distributed_sampler_kwargs=None
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            data.setup("fit")
        return "\n".join(record.message for record in caplog.records)

    (tmp_path / "a.txt").write_text("".join(f"Sentence {i} of a text. " for i in range(200)))
    data = text(str(tmp_path), vocab_size=4096)
    data.prepare_data()
    windows = data.splits.order.size(0)
    steps = -(-20 * windows // data.global_batch_size)
    assert "read the training data" not in remarks(steps - 1, 4096)
    times = round(1000 * data.global_batch_size / windows)
    said = remarks(1000, 4096)
    assert f"1,000 steps read the training data {times:,} times; trainer.max_steps sets how many" in said
    learned = re.search(
        r"data\.vocab_size=4096, but the text gave (\d+) tokens: .*; set data\.vocab_size=\1$", said, re.M
    )
    assert learned is not None
    assert "but the text gave" not in remarks(1, int(learned[1]))
