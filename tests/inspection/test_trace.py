"""Traces: figures equal those of a model in which a row is zeroed by hand, read by read.

Letters: C reads per token.
"""

from __future__ import annotations

import copy

import pytest
import torch
from ffn.plugin_contract import Case
from inspection.inspected import CASES, LetterTokenizer, emptied, letters, model_of, probabilities, without_read
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.inspection import add_slot_readings, effects, trace, tracing
from pkm_lightning.inspection.slot_sets import inspected_readers
from pkm_lightning.inspection.windows import Window, windows
from pkm_lightning.model import Transformer

TOKENIZER, TEXT = LetterTokenizer(), letters(7)
IDS = TOKENIZER.encode(TEXT)


def logits_of_next(model: Transformer, ids: list[int], scored: int) -> float:
    with torch.no_grad():
        hidden_BTD = model(torch.tensor([ids])).hidden_BTD
        return float(model.unembed(hidden_BTD[:, -1])[0, scored])


def brute_force(model: Transformer, name: str, place: int, read: int, scored: int) -> float:
    """Returns the effect of one read as two whole forwards of the text up to its token."""
    ids = IDS[: place + 1]
    without = without_read(model, name, place, read, len(ids))
    return logits_of_next(model, ids, scored) - logits_of_next(without, ids, scored)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_effects_are_those_of_a_row_that_is_zeroed_by_hand(case: Case) -> None:
    model = model_of(case)
    record = trace(model, TOKENIZER, TEXT, effects="exact")
    (text,) = record.texts
    assert text.scored[:-1] == IDS[1:]
    with torch.no_grad():
        traces = model(torch.tensor([IDS]), observe=True).traces
    for reader in record.readers:
        reads = text.reads[reader.name]
        expected = inspected_readers(model)[reader.name].reads(traces, {"input_ids": torch.tensor([IDS])})
        assert expected is not None
        assert reads.slots == expected.ids_THK.flatten(1).tolist()
        assert reads.weights == expected.weights_THK.flatten(1).tolist()
        effects_TC = torch.tensor(reads.effects)
        assert effects_TC.shape == (len(IDS), reader.heads * reader.reads)
        assert effects_TC.abs().max() > 1e-3
        for place, read in ((0, 0), (3, reader.reads - 1), (6, int(effects_TC[6].abs().argmax()))):
            by_hand = brute_force(model, reader.name, place, read, text.scored[place])
            assert_close(effects_TC[place, read], torch.tensor(by_hand))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predictions_with_and_without_reads_are_those_of_whole_forwards(case: Case) -> None:
    model = model_of(case)
    (text,) = trace(model, TOKENIZER, TEXT, effects="none").texts
    for shown, p_TW in ((text.p, probabilities(model, TEXT)), (text.p_without, probabilities(emptied(model), TEXT))):
        expected_T = p_TW.gather(1, torch.tensor(text.scored).unsqueeze(1)).flatten()
        assert_close(torch.tensor(shown), expected_T)
    assert text.scored[-1] == int(probabilities(model, TEXT)[-1].argmax())
    best = probabilities(model, TEXT).topk(5)
    assert [[token for token, _, _ in row] for row in text.top] == best.indices.tolist()
    assert_close(torch.tensor([[p for *_, p in row] for row in text.top]), best.values)
    assert text.tokens == list(zip(IDS, TEXT, strict=True))
    assert all(reads.effects is None for reads in text.reads.values())


# PLE normalises what it reads alone, so that the scale of a row hardly has an effect: the gradient is blind to it.
@pytest.mark.parametrize("case", [case for case in CASES if case.ffn != "ple"], ids=str)
def test_gradients_approximate_exact_effects(case: Case) -> None:
    model = model_of(case)
    records = [trace(model, TOKENIZER, TEXT, effects=how) for how in ("exact", "gradient")]
    assert [record.effects for record in records] == ["exact", "gradient"]
    for reader in records[0].readers:
        exact_TC, gradient_TC = (torch.tensor(record.texts[0].reads[reader.name].effects) for record in records)
        error = (exact_TC - gradient_TC).norm() / exact_TC.norm()
        assert 0 < error < 0.85, f"{reader.name}: {error}"
        assert torch.corrcoef(torch.stack([exact_TC.flatten(), gradient_TC.flatten()]))[0, 1] > 0.75


def test_gradients_are_derivatives_in_the_rows_scale_and_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Case("memory")).double()
    (table,) = model.value_tables
    record = trace(model, TOKENIZER, TEXT[:1], effects="gradient")
    (reads,) = record.texts[0].reads.values()
    assert all(parameter.grad is None for parameter in model.parameters())
    slot = next(slot for slot in reads.slots[0] if reads.slots[0].count(slot) == 1)
    logits = []
    for factor in (1 - 1e-6, 1 + 1e-6):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.value_tables[0].weight[slot] = table.weight[slot] * factor
        logits.append(logits_of_next(scaled, IDS[:1], record.texts[0].scored[0]))
    assert reads.effects is not None
    shown = reads.effects[0][reads.slots[0].index(slot)]
    assert (logits[1] - logits[0]) / 2e-6 == pytest.approx(shown, rel=1e-6)


def effects_of(model: Transformer, text: str, how: str, **options: int) -> dict[str, Tensor]:
    reads = trace(model, TOKENIZER, text, effects=how, **options).texts[0].reads
    return {name: torch.tensor(of_reader.effects) for name, of_reader in reads.items()}


@pytest.mark.parametrize("how", ["exact", "gradient"])
def test_effects_need_no_cache_and_few_copies(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Case("memory_plus"))
    with_cache = effects_of(model, TEXT, how)
    with monkeypatch.context() as patch:
        patch.setattr(effects, "_CACHE_BYTES", 1)
        few = effects_of(model, TEXT, how)
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "is_cacheable", False)
        without = effects_of(model, TEXT, how)
    for name, expected in with_cache.items():
        assert_close(few[name], expected)
        assert_close(without[name], expected)


def test_a_model_that_learns_rows_has_nothing_staged() -> None:
    model = model_of(Case("memory"))
    for table in model.value_tables:
        assert table.stage is not None
    stages, learning = [t.stage for t in model.value_tables], [p.requires_grad for p in model.parameters()]
    trace(model, TOKENIZER, TEXT, effects="gradient")
    assert [t.stage for t in model.value_tables] == stages
    assert [p.requires_grad for p in model.parameters()] == learning
    assert all(stage is not None and not stage.was_read for stage in stages)


@pytest.mark.parametrize(
    ("length", "context", "expected"),
    [
        (3, 8, [(0, 0, 3)]),
        (8, 8, [(0, 0, 8)]),
        (9, 8, [(0, 0, 8), (1, 8, 9)]),
        (17, 8, [(0, 0, 8), (4, 8, 12), (8, 12, 16), (9, 16, 17)]),
        (4, 3, [(0, 0, 3), (1, 3, 4)]),
    ],
)
def test_windows_report_each_token_once(length: int, context: int, expected: list[Window]) -> None:
    assert list(windows(length, context)) == expected


def test_a_long_text_is_read_in_windows() -> None:
    model, text = model_of(Case("memory_plus")), letters(17)
    record = trace(model, TOKENIZER, text, context=8, effects="exact")
    ids = TOKENIZER.encode(text)
    last = trace(model, TOKENIZER, TOKENIZER.decode(ids[9:17]), effects="exact")
    long, short = record.texts[0], last.texts[0]
    assert len(long.p) == len(long.tokens) == 17
    for name, reads in long.reads.items():
        assert len(reads.slots) == len(reads.weights) == len(reads.effects or ()) == 17
        assert reads.slots[16] == short.reads[name].slots[7]
        assert_close(torch.tensor(reads.effects)[16], torch.tensor(short.reads[name].effects)[7])
    assert long.p[16] == pytest.approx(short.p[7])


@pytest.mark.slow
def test_ten_thousand_tokens_are_traced_in_windows() -> None:
    model, text = model_of(Case("memory")), letters(10_000)
    record = trace(model, TOKENIZER, text, context=512, effects="none")
    add_slot_readings(record, model, TOKENIZER)
    (long,) = record.texts
    (reads,) = long.reads.values()
    assert len(long.p) == len(long.top) == len(long.p_without) == len(reads.slots) == len(reads.weights) == 10_000
    assert sum(slot.reads for slot in record.slots["table0"].values()) == 10_000 * 15
    # A window in the middle: its second half is what is reported of it.
    ids = TOKENIZER.encode(text)[256 * 6 : 256 * 8]
    p_T = probabilities(model, TOKENIZER.decode(ids))[256:511].gather(1, torch.tensor(ids[257:]).unsqueeze(1))
    assert_close(torch.tensor(long.p[256 * 7 : 256 * 8 - 1]), p_T.flatten())


def test_effects_are_exact_where_they_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Case("memory"))
    assert trace(model, TOKENIZER, TEXT).effects == "exact"
    params = sum(parameter.numel() for parameter in model.parameters()) - model.value_tables[0].weight.numel()
    monkeypatch.setattr(tracing, "_MOST_FLOPS", 2 * params * 7 * 15)
    assert trace(model, TOKENIZER, TEXT).effects == "exact"
    monkeypatch.setattr(tracing, "_MOST_FLOPS", 2 * params * 7 * 15 - 1)
    assert trace(model, TOKENIZER, TEXT).effects == "gradient"
    assert trace(model_of(Case("stem")), TOKENIZER, letters(106)).effects == "exact"


def test_what_cannot_be_traced_is_refused() -> None:
    model = model_of(Case("memory"))
    for text, options, message in (
        ([], {}, "is no text"),
        ([3], {}, "is no text"),
        (TEXT, {"context": 1}, "context=1"),
        (TEXT, {"effects": "all"}, "effects='?all'?"),
    ):
        with pytest.raises(ConfigError, match=message):
            trace(model, TOKENIZER, text, **options)
    with pytest.raises(ConfigError, match="neither value tables nor experts"):
        trace(model_of(Case("dense")), TOKENIZER, TEXT)
