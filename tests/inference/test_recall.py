"""Recall scores against a direct computation: exact match, choice among options, bits, and their means.

Letters: W vocabulary.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from toys import Constant, Letters, memory_ffns, transformer

from pkm_lightning.data import RecallItem
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inference.recall import ItemScore, can_become, normalise, score_items, summarise
from pkm_lightning.model import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return transformer(*memory_ffns()).eval()


def item(prompt: str, answer: str, options: tuple[str, ...] = (), **changes: Any) -> RecallItem:
    fields: dict[str, Any] = {"relation": "capital", "form": "seen", "exposures": 3, "decile": 0, "prior_bits": 2.5}
    return RecallItem(prompt=prompt, answer=answer, options=options, majority=False, **{**fields, **changes})


@functools.cache
def direct_bits(model: Transformer, prompt: str, answer: str) -> float:
    """Returns -log2 p(space, answer, end of text | prompt), one token after another."""
    codec = Letters()
    ids = codec.encode(prompt) or [codec.eos_id]
    bits = 0.0
    for target in [*codec.encode(" " + answer), codec.eos_id]:
        with torch.no_grad():
            log_p_W = model.unembed(model(torch.tensor([ids])).hidden_BTD)[0, -1].double().log_softmax(-1)
        bits -= log_p_W[target].item() / math.log(2)
        ids = [*ids, target]
    return bits


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Hague", "hague"),
        ("an Apple, a pear!", "apple pear"),
        ("theatre", "theatre"),
        ("St. John's", "st john s"),
        ("  A ", ""),
        ("1,234", "1 234"),
        ("Côte d'Azur", "côte d azur"),
    ],
)
def test_normalise(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@pytest.mark.parametrize(("precision", "cached"), [("32-true", True), ("bf16-true", True), ("32-true", False)])
def test_bits_and_choice_equal_a_direct_computation(model: Transformer, precision: str, cached: bool) -> None:
    """Also for a model with a plugin that may read any token, whose prompts are read with each option."""
    if not cached:
        model = transformer([Constant(0.1), *memory_ffns()[0][:1]]).eval()
    assert model.is_cacheable is cached
    options = ("cat", "a dog", "b", "elephants")
    items = [
        *(item("what is it?", option, options) for option in options),
        item("x", "b", options[::-1]),
        item("", "12"),
        item("a long prompt with words", "34"),
    ]
    # Only the default dtype follows the precision here, as in the forward context of a Trainer.
    with L.Trainer(precision=precision, accelerator="cpu", logger=False).precision_plugin.forward_context():
        scores = score_items(model, Letters(), items, device=CPU)
    assert [scored.chosen for scored in scores[:4]].count(True) == 1
    for scored, question in zip(scores, items, strict=True):
        assert scored.bits == pytest.approx(direct_bits(model, question.prompt, question.answer), rel=1e-4)
        by_option = {option: direct_bits(model, question.prompt, option) for option in question.options}
        expected = min(by_option, key=lambda o: by_option[o]) == question.answer if by_option else None
        assert scored.chosen is expected
        assert (scored.prompt, scored.truth) == (question.prompt, question.answer)


def test_exact_compares_normalised_greedy_answers(model: Transformer) -> None:
    """A wrong answer is cut where it is as long as any of its relation, a right one is not."""
    prompts = ["ab", "what is it?"]
    answers = greedy(model, Letters(), prompts, device=CPU)
    assert min(map(len, answers)) > 8
    questions = [(prompts[0], answers[0]), (prompts[0], f"the {answers[0]}!"), (prompts[1], "cat"), (prompts[1], "??")]
    of_relations = ["one", "one", "other", "third"]
    items = [item(*question, relation=name) for question, name in zip(questions, of_relations, strict=True)]
    scores = score_items(model, Letters(), items, device=CPU)
    assert [score.exact for score in scores] == [True, True, False, False]
    assert [score.answer for score in scores[:2]] == [answers[0], answers[0]]
    # Of the 4 and 3 tokens of " cat" and " ??".
    assert [score.answer for score in scores[2:]] == [answers[1][: len(scores[2].answer)], answers[1][:3].strip()]
    assert len(scores[2].answer) <= 4


_PIECES = st.sampled_from(
    [
        "a",
        "an",
        "the",
        "t",
        "th",
        "n",
        "x",
        "Paris",
        "theme",
        " ",
        "-",
        "\N{EN DASH}",
        ".",
        " n't",
        "\u03a3",
        "\u0130",
        "é",
    ]
)


@given(st.lists(_PIECES, max_size=7).map("".join), st.data())
def test_no_answer_that_can_become_the_truth_is_given_up(text: str, data: st.DataObject) -> None:
    beginning = text[: data.draw(st.integers(0, len(text)))]
    assert can_become(beginning, text)
    assert can_become(beginning, normalise(text)) or normalise(normalise(text)) != normalise(text)
    assert can_become(f"{beginning}\N{REPLACEMENT CHARACTER}", text)


@pytest.mark.parametrize(
    ("beginning", "truth", "possible"),
    [
        ("Par", "Paris", True),
        ("par", "The  Paris!", True),
        ("the", "Paris", True),
        ("th", "Paris", True),
        ("than", "Paris", False),
        ("the P", "Paris", True),
        ("Paris in", "Paris", False),
        ("Paris.", "Paris", True),
        ("", "Paris", True),
        ("London", "Paris", False),
    ],
)
def test_what_an_answer_can_become(beginning: str, truth: str, possible: bool) -> None:
    assert can_become(beginning, truth) is possible


def score(**changes: Any) -> ItemScore:
    fields: dict[str, Any] = {
        "form": "seen", "relation": "capital", "decile": 0, "prompt": "p", "truth": "t", "answer": "t",
        "exact": True, "chosen": None, "bits": 1.0, "prior_bits": 3.0,
    }  # fmt: skip
    return ItemScore(**{**fields, **changes})


def test_summarise_takes_means_by_form_relation_and_decile() -> None:
    summary = summarise(
        [
            score(exact=True, chosen=True, bits=1.0, prior_bits=4.0),
            score(exact=False, chosen=False, bits=9.0, prior_bits=4.0, relation="currency"),
            score(exact=False, chosen=True, bits=1.0, prior_bits=math.nan, decile=7),
            score(exact=True, form="control"),
        ]
    )
    assert list(summary) == ["control", "seen"]
    seen = summary["seen"]
    assert seen["n"] == 3
    assert seen["recall"] == pytest.approx(1 / 3)
    assert seen["choice"] == pytest.approx(2 / 3)
    assert seen["bits"] == pytest.approx((3 - 5) / 2)
    assert seen["bits_clipped"] == pytest.approx(3 / 2)
    assert seen["by_relation"]["capital"] == {"n": 2, "recall": 0.5, "choice": 1.0, "bits": 3.0, "bits_clipped": 3.0}
    assert seen["by_relation"]["currency"]["bits_clipped"] == 0.0
    assert seen["by_decile"].keys() == {"0", "7"}
    assert seen["by_decile"]["7"] == {"n": 1, "recall": 0.0, "choice": 1.0}
    assert "choice" not in summary["control"]


def test_nothing_to_summarise() -> None:
    assert summarise([]) == {}


def test_compiled_blocks_are_compiled_for_no_length_of_a_question(model: Transformer) -> None:
    compiled, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    for block in compiled.blocks:
        block.compile(backend=counter)
    items = [item("what is it?", "b", ("a dog", "b", "cat", "12")), item("x", "a long answer")]
    assert score_items(compiled, Letters(), items, device=CPU) == score_items(model, Letters(), items, device=CPU)
    assert counter.frame_count == 0
