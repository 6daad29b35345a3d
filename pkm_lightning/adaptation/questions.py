"""Questions about what a model is taught and what it knew, by form, and the share of them that it answers.

The forms of facts in a file: `seen` (a prompt that is learned), `paraphrase` (a test prompt) and `question`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pkm_lightning.adaptation.facts_file import Fact, read_facts
from pkm_lightning.build.loading import find_weights
from pkm_lightning.checkpoints.companions import companion_place
from pkm_lightning.data.base import RecallItem, TextCodec, answer_ids
from pkm_lightning.data.held_out import HELD_OUT, held_out_questions, holds_held_out
from pkm_lightning.inference.generation import greedy
from pkm_lightning.inference.recall import normalise

if TYPE_CHECKING:
    import torch

    from pkm_lightning.model import Transformer

#: Of a file of facts.
FACTS_SUFFIX = ".jsonl"


def questions_about(facts: Iterable[Fact], form: str | None = None) -> list[RecallItem]:
    """Returns the questions about facts: one per fact and form, or the prompts alone, as of `form`."""
    items = []
    for fact in facts:
        prompts = {"seen": fact.prompt} if form is None else {form: fact.prompt}
        if form is None and fact.test_prompts:
            prompts["paraphrase"] = fact.test_prompts[0]
        if form is None and fact.question is not None:
            prompts["question"] = fact.question
        items += [_item(prompt, fact.answer, name) for name, prompt in prompts.items()]
    return items


def _item(prompt: str, answer: str, form: str) -> RecallItem:
    return RecallItem(prompt, answer, (), "facts", form, 0, 0, math.nan, False)


def known_questions(path: str, key: str) -> tuple[list[RecallItem], Path | None]:
    """Returns the questions about what was known, and the folder of held-out data that they lie in, if it is one.

    Args:
        path: a file of facts, or a run, a checkpoint or an export; only a run has held-out questions.
        key: that `path` is the value of, for messages.

    Raises:
        CheckpointError: there is no such run.
        DataError: the file is missing or malformed.
    """
    if path.endswith(FACTS_SUFFIX):
        return questions_about(read_facts(Path(path), key)), None
    folder = companion_place(find_weights(Path(path), f"{key}="), HELD_OUT)
    return (held_out_questions(folder), folder) if holds_held_out(folder) else ([], None)


def first_of_each_form(items: Iterable[RecallItem], limit: int) -> list[RecallItem]:
    """Returns the first `limit` items of each form."""
    counts, chosen = Counter[str](), list[RecallItem]()
    for item in items:
        counts[item.form] += 1
        if counts[item.form] <= limit:
            chosen.append(item)
    return chosen


def exact_answers(
    model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem], *, device: torch.device
) -> list[bool]:
    """Returns whether the greedy answer to each item is the right one, up to case, punctuation and articles."""
    if not items:
        return []
    # An answer that goes on for longer is wrong anyway, and a model that was never taught to stop would write on.
    longest = max(len(answer_ids(tokenizer, item.answer)) for item in items)
    answers = greedy(model, tokenizer, [item.prompt for item in items], device=device, max_new_tokens=longest + 2)
    return [normalise(answer) == normalise(item.answer) for answer, item in zip(answers, items, strict=True)]


def recall_by_form(
    model: Transformer, tokenizer: TextCodec, items: Sequence[RecallItem], *, device: torch.device
) -> dict[str, float]:
    """Returns the share of right answers by form; `model` is in evaluation mode."""
    by_form: dict[str, list[bool]] = {}
    for item, is_exact in zip(items, exact_answers(model, tokenizer, items, device=device), strict=True):
        by_form.setdefault(item.form, []).append(is_exact)
    return {form: sum(answers) / len(answers) for form, answers in by_form.items()}
