"""Inspection of pretrained models with plugins: effects equal those of a row that is zeroed by hand."""

from __future__ import annotations

from pathlib import Path

import pretrained_models
import pytest
import torch
from ffn.drawn_weights import draw
from inspection.inspected import without_read
from small import resolved
from tolerances import assert_close

from pkm_lightning.build.model import build_model
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError
from pkm_lightning.inspection import add_ablation, add_slot_readings, trace
from pkm_lightning.model import Transformer

TEXT = "Paris, I said"  # longer than the windows of attention
MEMORY = ("ffn=memory_plus", "model.memory={n_keys: 6, heads: 2, knn: 3, key_dim: 8}", "placement.layers=[1]")


def retrofitted(name: str, folder: Path, *overrides: str) -> Transformer:
    pretrained_models.save(name, folder)
    run = resolved("model=hf", f"model.path={folder}", "data.seq_len=32", "trainer.accelerator=cpu", *overrides)
    model = build_model(run.config)
    draw(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama_tied", (*MEMORY, "placement.mode=replace")),
        ("qwen2", (*MEMORY, "placement.mode=parallel")),
        ("gpt2", (*MEMORY, "placement.mode=parallel")),
        ("mistral", ("ffn=engram", "ffn.row_dim=5", "placement.layers=[1]", "placement.mode=before")),
    ],
)
def test_a_retrofitted_model_is_inspected_as_any_other(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    model, tokenizer = retrofitted(name, tmp_path, *overrides), bytes_tokenizer()
    record = trace(model, tokenizer, TEXT)
    (reader,), (text,) = record.readers, record.texts
    assert record.effects == "exact"
    assert [token for _, token in text.tokens] == list(TEXT)
    effects_TC = torch.tensor(text.reads[reader.name].effects)
    assert effects_TC.abs().max() > 1e-4
    ids = [token for token, _ in text.tokens]
    for place in (0, 5, 12):
        read = int(effects_TC[place].abs().argmax())
        prefix = torch.tensor([ids[: place + 1]])
        logits = []
        for asked in (model, without_read(model, reader.name, place, read, place + 1)):
            with torch.no_grad():
                logits.append(asked.unembed(asked(prefix).hidden_BTD[0, -1])[text.scored[place]])
        assert_close(effects_TC[place, read], logits[0] - logits[1])
    add_slot_readings(record, model, tokenizer, [{"input_ids": torch.tensor([ids])}], data="data")
    assert all(slot.reads % 2 == 0 for slot in record.slots["table0"].values())  # once in the text, once in the data
    add_ablation(record, model, tokenizer, {"table0": None})
    assert_close(torch.tensor(record.ablations[0].p_without[0]), torch.tensor(text.p_without))


def test_a_model_without_plugins_and_one_that_is_no_trunk_are_refused(tmp_path: Path) -> None:
    plain = retrofitted("llama", tmp_path, "ffn=pretrained")
    for model, message in (
        (plain, "neither value tables nor experts"),
        (plain.network, "a LlamaForCausalLM does not list its plugins; give a trunk of this package"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace(model, bytes_tokenizer(), TEXT)
