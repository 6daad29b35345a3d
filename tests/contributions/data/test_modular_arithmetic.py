"""A data source made by following CONTRIBUTING.md: one Python file, one YAML and this test.

The fixture stands for dropping the Python file into `pkm_lightning/data/`, `--config-dir` for dropping the YAML into
`configs/data/`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import assert_equal_runs, last_checkpoint
from small import Run, record

import pkm_lightning.data
from pkm_lightning.errors import ConfigError
from pkm_lightning.training import LanguageModule

HERE = Path(__file__).parent
MODULE = "pkm_lightning.data.modular_arithmetic"
RUN = [
    f"--config-dir={HERE.parent}",
    *("data=modular_arithmetic", "ffn=dense", "model.dim=16", "model.n_heads=2", "model.n_kv_heads=2"),
    *("model.ffn_dim=24", "model.n_layers=1", "trainer.max_steps=4", "trainer.val_check_interval=4"),
    *("trainer.log_every_n_steps=1", "callbacks.recall.val_items=2", "callbacks.samples.max_new_tokens=2"),
    *("~callbacks.progress_bar", "logger=none"),
]
OPTIONS: dict[str, Any] = {
    "modulus": 5, "val_fraction": 0.2, "seed": 0, "tokenizer": "bytes", "vocab_size": 300, "seq_len": 32,
    "global_batch_size": 4, "num_workers": 0, "order_seed": 1, "prompts": [], "prompts_file": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _dropped_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pkm_lightning.data, "__path__", [*pkm_lightning.data.__path__, str(HERE)])
    yield
    sys.modules.pop(MODULE, None)
    vars(pkm_lightning.data).pop("modular_arithmetic", None)


def test_every_sum_is_shown_once_per_epoch_or_held_out(tmp_path: Path) -> None:
    data = pkm_lightning.data.ModularArithmetic(**OPTIONS, cache_dir=str(tmp_path))
    data.prepare_data()
    texts = []
    for source, keys in (
        (data.splits.train, data.splits.order.keys(0)),
        (data.splits.validation, data.splits.validation_keys),
    ):
        batch = source.__getitems__(list(keys))
        documents = [
            (data.tokenizer.decode(ids[docs == d].tolist()), data.tokenizer.decode(labels[docs == d].tolist()))
            for ids, docs, labels in zip(
                batch["input_ids"], batch["doc_ids"], batch["labels"].clamp_min(0), strict=True
            )
            for d in range(int(docs.max()) + 1)
        ]
        assert (batch["labels"] == pkm_lightning.data.NO_TARGET).any()
        assert all(text.endswith(f"={target}") for text, target in documents)
        texts.append({text for text, _ in documents})
    assert (len(texts[0]), len(texts[1])) == (data.n_facts, 5) == (20, 5)
    assert texts[0] | texts[1] == {f"{a} + {b} = {(a + b) % 5}" for a in range(5) for b in range(5)}


@pytest.mark.parametrize(("key", "value"), [("modulus", 1), ("val_fraction", 1.0), ("seed", -1)])
def test_wrong_values_are_refused(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}={value} is out of range"):
        pkm_lightning.data.ModularArithmetic(**{**OPTIONS, key: value}, cache_dir=str(tmp_path))


def test_a_model_is_fitted_resumed_exactly_and_asked(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = cli("fit", *RUN, "run_dir=whole")
    assert shown.code == 0, shown.err
    saved = record(tmp_path / "whole")
    assert saved["facts"] == 135
    assert len(saved["data"]) == 64
    assert {"test/loss", "test/recall_validation", "test/bits_validation"} <= saved["metrics"].keys()

    training_step = LanguageModule.training_step

    def interrupted(module: LanguageModule, *arguments: Any) -> Any:
        if module.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return training_step(module, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", interrupted)
        assert cli("fit", *RUN, "run_dir=resumed").code == 143
    assert 0 < last_checkpoint(tmp_path / "resumed")["global_step"] < 4
    assert cli("fit", *RUN, "run_dir=resumed").code == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "resumed")

    asked = cli("predict", "run_dir=resumed", 'data.prompts=["3 + 4 =","12 + 12 ="]')
    assert asked.code == 0, asked.err
    answers = [json.loads(line) for line in (tmp_path / "resumed" / "predictions.jsonl").read_text().splitlines()]
    assert [(answer["index"], answer["prompt"]) for answer in answers] == [(0, "3 + 4 ="), (1, "12 + 12 =")]
