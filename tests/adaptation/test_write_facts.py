"""Facts written into tiny models: answered afterwards, within the bound, and nothing of the model has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import DIM, VOCAB, Letters, dense, memory_plus, transformer

from pkm_lightning.adaptation.fact_sequences import fact_sequences, margins
from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.adaptation.text_batches import TextParts, check_bounding
from pkm_lightning.adaptation.write_facts import write_facts
from pkm_lightning.build.edits import EditedTables
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.ffn import PEER, PKM, Engram, MemoryPlus, UltraMem
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.model import Transformer

FACTS = [Fact("is zob", "7", ("a zob",), ("so zob",)), Fact("is vex", "b", ("a vex",), question="vex?")]
CPU = torch.device("cpu")
QUICK: dict[str, Any] = {
    "max_steps": 200,
    "lr": 3.0,
    # The drift of large deltas outgrows the divergence, which hardly counts here.
    "kl_bound": 1e4,
    "margin": 0.1,
    "max_seconds": 60.0,
    "ends": False,
}


def other_text(seed: int = 1) -> TextParts:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCAB, (4, 13), generator=generator) for _ in range(2)]
    penalised, held_out = ({"input_ids": part[:, :-1], "labels": part[:, 1:].contiguous()} for part in ids)
    return TextParts([penalised], [held_out])


def memory_model(learning: str = "rows") -> Transformer:
    torch.manual_seed(0)
    table = ValueTable(rows=49, dim=10, learning=learning)
    return transformer([memory_plus(table), dense(2)], [table]).eval()


def answered(model: Transformer, facts: list[Fact]) -> list[bool]:
    sequences = fact_sequences(facts, Letters(), lambda fact: fact.learned, ends=False)
    return (margins(model, sequences, device=CPU) > 0).tolist()


def plugin(name: str) -> torch.nn.Module:
    return {
        "pkm": lambda: PKM(dim=DIM, n_keys=7, heads=2, knn=3, key_dim=6),
        "peer": lambda: PEER(dim=DIM, n_keys=7, heads=2, knn=3, key_dim=6),
        "ultramem": lambda: UltraMem(dim=DIM, n_keys=8),
        "engram": lambda: Engram(dim=DIM, vocab_size=VOCAB, rows=64),
    }[name]()


@pytest.mark.parametrize("name", ["pkm", "peer", "ultramem", "engram"])
def test_every_kind_of_table_learns_facts(name: str) -> None:
    model = transformer([plugin(name), dense(2)]).eval()
    tables = EditedTables(model)
    edit = write_facts(model, Letters(), FACTS, other_text=other_text(), tables=tables, **QUICK)
    assert not any(answered(model, FACTS))
    tables.apply(edit)
    now = answered(model, FACTS)
    assert edit.figures["learned"] == {"prompts": 4, "before": 0.0, "after": sum(now) / 4}
    assert sum(now) >= 3, edit.figures


@pytest.mark.parametrize("size", [pytest.param(1.0, marks=pytest.mark.slow), 1e-3])
def test_rows_that_start_at_zero_move_as_far_as_the_model_needs(size: float) -> None:
    """A pretrained stream may be thousands of times larger than what rows of the usual size add to it."""
    model = memory_model()
    with torch.no_grad():
        model.tables[0].weight.zero_()  # type: ignore[union-attr, operator]
        model.blocks[0].ffn.out.weight.mul_(size)  # type: ignore[union-attr, operator]
    tables = EditedTables(model)
    edit = write_facts(model, Letters(), FACTS, other_text=other_text(), tables=tables, **QUICK)
    assert edit.figures["learned"]["after"] >= 0.75, edit.figures


@pytest.mark.parametrize("learning", ["rows", "dense"])
def test_writing_leaves_the_model_as_it_was_and_reports_what_an_edit_does(learning: str) -> None:
    model = memory_model(learning).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learns = [parameter.requires_grad for parameter in model.parameters()]
    tables, looks = EditedTables(model), []
    edit = write_facts(model, Letters(), FACTS, other_text=other_text(), tables=tables, watch=looks.append, **QUICK)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == learns
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tables.applied == {}
    assert edit.figures["learned"]["after"] >= looks[-1].right >= 0.75
    assert edit.facts == tuple(fact.record() for fact in FACTS)
    assert {name: edit.figures[name]["prompts"] for name in ("test_prompts", "question")} == {
        "test_prompts": 1,
        "question": 1,
    }

    model.eval()
    text = other_text()
    drift = OtherText(model, text.held_out, device=CPU)
    assert drift.mean_divergence() == pytest.approx(0.0, abs=1e-7)
    tables.apply(edit)
    assert drift.mean_divergence() == pytest.approx(edit.figures["kl"], rel=1e-4)
    # Only lines of the edit have moved.
    changed_N = (model.tables[0].weight != before["tables.0.weight"]).any(1)  # type: ignore[operator]
    assert changed_N.nonzero().flatten().tolist() == edit.tables["tables.0.weight"].lines_U.tolist()
    others = {name: value for name, value in model.state_dict().items() if name != "tables.0.weight"}
    assert all(torch.equal(value, before[name]) for name, value in others.items())
    tables.remove(edit.name)
    assert torch.equal(model.tables[0].weight, before["tables.0.weight"])  # type: ignore[arg-type]


def test_the_divergence_stays_within_its_bound_and_fewer_rows_move_where_few_may() -> None:
    model = memory_model()
    settings = {**QUICK, "kl_bound": 1e-4, "rows_per_fact": 3, "max_steps": 40}
    edit = write_facts(model, Letters(), FACTS, other_text=other_text(), **settings)
    assert 0 < edit.figures["kl"] <= 1e-4 * 1.01
    assert edit.n_lines <= 6
    assert edit.figures["ended"] == "steps"


def test_of_looks_with_as_many_right_answers_the_largest_margin_counts() -> None:
    model, looks = memory_model(), []
    settings = {**QUICK, "lr": 1e-3, "margin": 50.0, "max_steps": 40}
    tables = EditedTables(model)
    edit = write_facts(model, Letters(), FACTS, other_text=other_text(), tables=tables, watch=looks.append, **settings)
    assert [look.right for look in looks] == [looks[0].right] * len(looks)
    assert looks[0].margin < looks[-1].margin
    tables.apply(edit)
    sequences = fact_sequences(FACTS, Letters(), lambda fact: fact.learned, ends=False)
    assert margins(model, sequences, device=CPU).mean().item() == pytest.approx(max(look.margin for look in looks))
    assert edit.figures["kl"] == pytest.approx(looks[-1].divergence, rel=1e-3)


def test_facts_that_are_known_make_an_edit_without_rows() -> None:
    model = memory_model()
    tables = EditedTables(model)
    first = write_facts(model, Letters(), FACTS, other_text=other_text(), name="one", tables=tables, **QUICK)
    tables.apply(first)
    known = [fact for fact in FACTS if all(answered(model, [fact]))]
    assert known
    again = write_facts(model, Letters(), known, other_text=other_text(), name="two", tables=tables, **QUICK)
    assert (again.n_lines, again.figures["ended"], again.figures["steps"]) == (0, "known", 0)


def test_text_that_leaves_nothing_to_measure_the_bound_on_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    penalised, held_out = other_text()
    without = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in held_out]
    for empty in ([], without):
        with pytest.raises(DataError, match=r"no token to measure kl_bound on: .*; give drift_path=FILE"):
            write_facts(memory_model(), Letters(), FACTS, other_text=TextParts(penalised, empty))
    assert not caplog.records
    check_bounding(TextParts(penalised, held_out * 41))
    assert "kl_bound is measured on 1,968 tokens of other text, fewer than 2,000" in caplog.text
    caplog.clear()
    check_bounding(TextParts([], held_out * 42))
    assert not caplog.records


def test_the_divergence_is_the_formula_written_out() -> None:
    model, (_, (batch,)) = memory_model(), other_text()
    batch["labels"][0] = -100
    drift = OtherText(model, [batch], device=CPU)
    before = model.unembed(model(batch["input_ids"]).hidden_BTD).softmax(-1)
    model.tables[0].weight.data += 0.5  # type: ignore[operator]
    now = model.unembed(model(batch["input_ids"]).hidden_BTD).softmax(-1)
    expected = (before * (before.log() - now.log())).sum(-1)[1:].mean().item()
    assert drift.mean_divergence() == pytest.approx(expected, rel=1e-4)
    assert drift.n_tokens == 36


def test_an_edit_goes_together_with_those_that_are_applied() -> None:
    model = memory_model()
    tables = EditedTables(model)
    first = write_facts(model, Letters(), FACTS[:1], other_text=other_text(), name="one", tables=tables, **QUICK)
    assert first.figures["learned"]["after"] == 1.0
    tables.apply(first)
    second = write_facts(model, Letters(), FACTS[1:], other_text=other_text(), name="two", tables=tables, **QUICK)
    assert second.weights == first.weights
    collision = second.figures["collisions"]["one"]
    shared = set(first.tables["tables.0.weight"].lines_U.tolist()) & set(
        second.tables["tables.0.weight"].lines_U.tolist()
    )
    assert collision["rows"] == len(shared) > 0
    tables.apply(second)
    now = answered(model, FACTS[:1])
    assert collision["after"] == sum(now) / len(now)
    assert collision["before"] == 1.0
    assert collision["lost"] == ([] if all(now) else ["is zob"])
    assert all(answered(model, FACTS[1:]))
    # In another order the same bits.
    both = model.tables[0].weight.clone()  # type: ignore[operator]
    tables.remove("one")
    tables.apply(first)
    assert torch.equal(model.tables[0].weight, both)  # type: ignore[arg-type]


def test_what_cannot_be_edited_is_refused() -> None:
    text = other_text()
    with pytest.raises(ConfigError, match="has no value table"):
        write_facts(transformer([dense()]), Letters(), FACTS, other_text=text)
    quantised = QuantizedTable(rows=49, dim=16, bits=8)
    reader = MemoryPlus(dim=DIM, n_keys=7, heads=2, knn=3, key_dim=6, table=quantised)
    model = transformer([reader], [quantised])
    with pytest.raises(ConfigError, match=r"is quantised, .* edit the run or file that it was exported from"):
        write_facts(model, Letters(), FACTS, other_text=text)
    with pytest.raises(ConfigError, match=r"kl_bound=0 is out of range"):
        write_facts(memory_model(), Letters(), FACTS, other_text=text, kl_bound=0)
    with pytest.raises(DataError, match=r"fact 1: .* sequences of 5"):
        write_facts(memory_model(), Letters(), FACTS, other_text=text, context=5)
