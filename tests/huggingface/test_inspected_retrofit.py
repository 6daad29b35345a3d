"""Inspection of pretrained models with plugins: effects equal those of a row that is zeroed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pretrained_models
import pytest
import torch
from ffn.drawn_weights import draw
from inspection.inspected import without_read
from small import resolved
from tolerances import assert_close

from pkm_lightning import Engram, MemoryPlus, replace_ffn
from pkm_lightning.build.model import build_model
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError
from pkm_lightning.inspection import ablate, add_ablation, add_slot_readings, mask, trace
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


class _Tokenizer:
    """The part of a tokenizer of transformers that is read, of one token per byte."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 257

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return bytes_tokenizer().encode(text)

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes_tokenizer().decode(ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def replaced(name: str, ffn: type, **options: Any) -> Any:
    model = pretrained_models.tiny(name).eval()
    replace_ffn(model, layers=[1], ffn=ffn, mode="parallel", zero_start=False, **options)
    with torch.no_grad():
        for table in model.value_tables:
            table.weight.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "ffn", "options"),
    [
        ("llama_tied", MemoryPlus, {"n_keys": 6, "heads": 2, "knn": 3}),
        ("gpt2", MemoryPlus, {"n_keys": 6, "heads": 2, "knn": 3}),
        ("qwen2", Engram, {"rows": 64, "row_dim": 5}),
    ],
)
def test_a_model_of_transformers_is_inspected_after_replace_ffn(name: str, ffn: type, options: dict[str, Any]) -> None:
    model = replaced(name, ffn, **options)
    record = trace(model, _Tokenizer(), TEXT)
    (reader,), (text,) = record.readers, record.texts
    reads = text.reads[reader.name]
    ids = torch.tensor([[token for token, _ in text.tokens]])
    with torch.no_grad():
        logits_TW = model(ids, use_cache=False).logits[0]
    scored_T1 = torch.tensor(text.scored).unsqueeze(1)
    assert_close(torch.tensor(text.p), logits_TW.softmax(-1).gather(1, scored_T1).flatten())
    (table,) = model.value_tables
    # A slot that nothing else in the text reads: its row at zero is this read left out.
    everywhere = [slot for row in reads.slots for slot in row]
    place, read = next(
        (t, c) for t, row in enumerate(reads.slots) for c, slot in enumerate(row) if everywhere.count(slot) == 1
    )
    slot = reads.slots[place][read]
    with mask(model, [slot]), torch.no_grad():
        masked_TW = model(ids, use_cache=False).logits[0]
    with torch.no_grad():
        table.weight.view(table.rows, -1)[slot] = 0
        assert torch.equal(model(ids, use_cache=False).logits[0], masked_TW)
    difference = (logits_TW - masked_TW)[place, text.scored[place]]
    assert reads.effects is not None
    assert abs(difference) > 1e-4
    assert_close(torch.tensor(reads.effects)[place, read], difference)
    zeroed = ablate(model, _Tokenizer(), TEXT, {"table0": None})
    assert_close(torch.tensor(zeroed.p_without[0]), torch.tensor(text.p_without))


def test_a_model_without_plugins_and_one_that_is_no_trunk_are_refused(tmp_path: Path) -> None:
    plain = retrofitted("llama", tmp_path, "ffn=pretrained")
    for model, message in (
        (plain, "neither value tables nor experts"),
        (plain.network, "a LlamaForCausalLM has no plugins of this package to look at; give one that replace_ffn"),
        (replaced("llama", MemoryPlus, n_keys=6, knn=3).model, "a LlamaModel has no unembedding"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace(model, bytes_tokenizer(), TEXT)
