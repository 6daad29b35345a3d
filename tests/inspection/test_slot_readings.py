"""Who reads a slot most, and what is left without slots: equal to what a plain loop over all forwards finds."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from ffn.plugin_contract import Case
from inspection.inspected import CASES, END, LetterTokenizer, letters, model_of, probabilities
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.data.base import RecallItem, answer_ids
from pkm_lightning.errors import ConfigError
from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inspection import ablate, add_ablation, add_slot_readings, mask, trace
from pkm_lightning.inspection.masking import checked_choice
from pkm_lightning.inspection.slot_sets import inspected_readers, set_of_readers, slot_sets
from pkm_lightning.model import Transformer

TOKENIZER, TEXT = LetterTokenizer(), letters(5)
MOST = 3


def item(prompt: str, answer: str) -> RecallItem:
    return RecallItem(prompt, answer, (), "letters", "seen", 1, 0, float("nan"), False)


def batches() -> list[dict[str, Tensor]]:
    """Three batches with padding, of which one says where it is by `valid`."""
    generator = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(END, (2, 6), generator=generator)} for _ in range(3)]
    made[0]["doc_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    made[1]["valid"] = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    return made


def plain_readings(
    model: Transformer, sequences: list[tuple[object, dict[str, Tensor], int]]
) -> dict[str, dict[int, list[tuple[float, object, int, str]]]]:
    """Returns, by set and slot, weight, title, position and reader of every read, by a loop over everything."""
    readers = inspected_readers(model)
    of_reader = set_of_readers(slot_sets(readers))
    found: dict[str, dict[int, list[tuple[float, object, int, str]]]] = defaultdict(lambda: defaultdict(list))
    for title, batch, row in sequences:
        with torch.no_grad():
            options = {f"{name}_BT": batch[name] for name in ("doc_ids", "valid") if name in batch}
            traces = model(batch["input_ids"], **options, observe=True).traces
        for name, reader in readers.items():
            reads = reader.reads(traces, batch)
            assert reads is not None
            width = batch["input_ids"].shape[1]
            for place in range(width):
                is_padding = "doc_ids" in batch and batch["doc_ids"][row, place] < 0
                if is_padding or ("valid" in batch and not batch["valid"][row, place]):
                    continue
                ids, weights = (values.flatten(1)[row * width + place].tolist() for values in reads[:2])
                for slot, weight in zip(ids, weights, strict=True):
                    found[of_reader[name].name][slot].append((weight, title, place, name))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_readers_are_those_of_a_plain_loop(case: Case) -> None:
    model = model_of(case)
    record = trace(model, TOKENIZER, TEXT, effects="none")
    add_slot_readings(record, model, TOKENIZER, batches(), most=MOST, data="validation")
    text = {"input_ids": torch.tensor([TOKENIZER.encode(TEXT)])}
    sequences: list[tuple[object, dict[str, Tensor], int]] = [(0, text, 0)]
    sequences += [(f"validation {2 * n + row + 1}", batch, row) for n, batch in enumerate(batches()) for row in (0, 1)]
    found = plain_readings(model, sequences)
    assert record.data == "validation"
    assert record.slots.keys() == {reader.table for reader in record.readers}
    for table, slots in record.slots.items():
        of_text = {
            slot
            for r in record.readers
            if r.table == table
            for row in record.texts[0].reads[r.name].slots
            for slot in row
        }
        assert {int(slot) for slot in slots} == of_text
        for slot, shown in slots.items():
            expected = found[table][int(slot)]
            assert shown.reads == len(expected)
            of_tokens: dict[tuple[object, ...], float] = {}
            for weight, *where in expected:  # heads of a token that read the same slot are one reader
                of_tokens[tuple(where)] = max(abs(weight), of_tokens.get(tuple(where), 0.0))
            largest = sorted(of_tokens.values(), reverse=True)[:MOST]
            assert [abs(reading.weight) for reading in shown.readers] == pytest.approx(largest, rel=1e-5)
            for reading in shown.readers:
                matches = [w for w, *where in expected if where == [reading.text, reading.position, reading.reader]]
                assert any(weight == pytest.approx(reading.weight, rel=1e-5) for weight in matches)


def test_readings_show_the_text_around_the_token() -> None:
    model = model_of(Case("stem"))  # slot n is token n
    record = trace(model, TOKENIZER, TEXT[:1], effects="none")
    (slot,) = TOKENIZER.encode(TEXT[:1])
    batch = {"input_ids": torch.tensor([[7, slot - 1, slot, slot + 2, slot + 1, 9, 7]])}
    batch["doc_ids"] = torch.tensor([[0, 1, 1, 1, 1, 2, -1]])
    add_slot_readings(record, model, TOKENIZER, [batch], most=9, data="d")
    of_text, of_data = record.slots["table0"][str(slot)].readers
    assert (of_text.text, of_text.before, of_text.token, of_text.after) == (0, "", TEXT[:1], "")
    shown = (of_data.text, of_data.position, of_data.before, of_data.token, of_data.after)
    assert shown == ("d 1", 2, TOKENIZER.decode([slot - 1]), TEXT[:1], TOKENIZER.decode([slot + 2, slot + 1]))


def test_facts_are_the_questions_whose_answers_are_predicted_by_a_slot() -> None:
    model = model_of(Case("memory"))
    questions = [item(letters(4, seed), letters(2, seed + 50)) for seed in range(6)]
    record = trace(model, TOKENIZER, TEXT, effects="none")
    add_slot_readings(record, model, TOKENIZER, questions=questions, most=MOST)
    expected: dict[int, dict[str, float]] = defaultdict(dict)
    for question in questions:
        prompt, answer = TOKENIZER.encode(question.prompt), answer_ids(TOKENIZER, question.answer)
        batch = {"input_ids": torch.tensor([[*prompt, *answer[:-1]]])}
        for slot, reads in plain_readings(model, [("", batch, 0)])["table0"].items():
            sizes = [abs(weight) for weight, _, place, _ in reads if place >= len(prompt) - 1]
            if sizes:
                expected[slot][question.prompt] = max(sizes)
    seen = 0
    for slot, shown in record.slots["table0"].items():
        largest = sorted(expected[int(slot)].values(), reverse=True)
        assert [abs(fact.weight) for fact in shown.facts] == pytest.approx(largest[:MOST], rel=1e-5)
        seen += len(shown.facts)
    assert seen > 0


def without(model: Transformer, table: str, slots: list[int]) -> Transformer:
    """Returns a copy whose rows or experts `slots` hold zeros."""
    copied = copy.deepcopy(model)
    for reader in slot_sets(inspected_readers(copied))[table].readers:
        with torch.no_grad():
            for one in reader.slots.tables:
                one.weight.view(one.rows, -1)[slots] = 0
            for module in reader.plugin.modules() if not reader.slots.tables else ():
                if isinstance(module, SwiGLUExperts):
                    module.out[slots] = 0
    return copied


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_ablation_is_a_forward_of_the_model_without_these_rows(case: Case) -> None:
    model = model_of(case)
    record = trace(model, TOKENIZER, TEXT, effects="none")
    table = record.readers[-1].table
    slots = sorted({slot for row in record.texts[0].reads[record.readers[-1].name].slots for slot in row})[:2]
    add_ablation(record, model, TOKENIZER, {table: slots})
    (ablation,) = record.ablations
    emptied = without(model, table, slots)
    targets_T1 = torch.tensor(record.texts[0].scored).unsqueeze(1)
    for asked, loss in ((model, ablation.loss[0]), (emptied, ablation.loss_without[0])):
        nats_T = probabilities(asked, TEXT).log().gather(1, targets_T1).flatten()
        assert loss == pytest.approx(-float(nats_T[:-1].mean()), rel=1e-4)
    p_TW = probabilities(emptied, TEXT)
    assert_close(torch.tensor(ablation.p_without[0]), p_TW.gather(1, targets_T1).flatten())
    assert [row[0][0] for row in ablation.top_without[0]] == p_TW.argmax(-1).tolist()
    assert ablation.loss != ablation.loss_without
    assert ablation.masked == {table: slots}
    assert ablation == ablate(model, TOKENIZER, TEXT, {table: slots})


def test_recall_is_asked_with_and_without() -> None:
    model = model_of(Case("memory"))
    questions = [item(letters(4, seed), "") for seed in range(3)]
    answers = [model_answer(model, question.prompt) for question in questions]
    known = [item(question.prompt, answer) for question, answer in zip(questions, answers, strict=True)]
    ablation = ablate(model, TOKENIZER, TEXT, {"table0": None}, questions=known)
    assert ablation.recall == 1.0
    assert ablation.recall_without is not None
    assert ablation.recall_without < 1
    assert ablation.masked == {"table0": None}


def model_answer(model: Transformer, prompt: str) -> str:
    (answer,) = greedy(model, TOKENIZER, [prompt], device=torch.device("cpu"))
    return answer


def test_a_mask_names_sets_and_slots_that_there_are() -> None:
    one, two = model_of(Case("memory")), model_of(Case("ultramem_v2", {"value_dim": 6, "cores": 2}))
    for model, slots, message in (
        (one, [36], "slots=36: table0 has the slots 0 to 35"),
        (one, [-1], "slots=-1"),
        (one, {"table0": [True]}, "slots=True"),
        (one, {"tabel0": [1]}, "slots=tabel0 is no set .* table0 .36 slots.*table0"),
        (one, 3, "slots=3 is no list of slots of table0; give their numbers"),
        (one, {"table0": "3"}, "slots='3' is no list of slots of table0"),
        (one, [1.0], "slots=1.0: table0 has the slots 0 to 35"),
        (one, None, "slots=None is no choice among table0; give"),
        (two, [1], "is no choice among table0, table1"),
    ):
        with pytest.raises(ConfigError, match=message), mask(model, slots):
            pass
    assert all(table.masks == () for table in one.value_tables)
    for slots in ((1, 3), torch.tensor([3, 1, 3]), np.array([1, 3])):
        assert checked_choice(slot_sets(inspected_readers(one)), slots) == {"table0": [1, 3]}
