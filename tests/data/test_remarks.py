"""What a run remarks about its data before it trains: ids that mean nothing, and how often they are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from shard_folders import text as text_document
from shard_folders import write_folder

from pkm_lightning.data import MixDataModule, TextDataModule
from pkm_lightning.data.packing import PieceOrder


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


def test_blocks_of_an_epoch_and_the_smallest_source_of_a_mixture_count(tmp_path: Path) -> None:
    assert PieceOrder(np.full(10, 3), capacity=None, seed=0, block=4).sections == 3
    documents = [text_document(f"document {i}") for i in range(30)]
    folders = [
        write_folder(tmp_path, {"train": documents[:n], "validation": documents[:2]}, name=str(n)) for n in (5, 30)
    ]
    data = MixDataModule(
        sources={path.name: {"path": str(path)} for path in folders}, packing="none", seq_len=32, global_batch_size=4,
        num_workers=0, order_seed=0, cache_dir=str(tmp_path), prompts=[], prompts_file=None,
    )  # fmt: skip
    data.prepare_data()
    # Half of the 400 sequences are of the source with 5.
    assert data.passes(100) == 40
