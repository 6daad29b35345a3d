"""A recall item asks for one answer; how it was taught decides which kind of recall it tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecallItem:
    """One question of a recall test. The model continues `prompt` with a space, the answer and the end token.

    Attributes:
        prompt: text without a trailing space.
        answer: the right continuation, without the leading space.
        options: 4 distinct answers in random order, the right one among them; empty if there are not so many.
        relation: what is asked, such as `birth_city`.
        form: `seen`, `paraphrase`, `unseen_template`, `question`, `unseen_question`, `control` or `validation`.
        exposures: how often training showed the fact per epoch, in any form.
        decile: 0 (most shown tenth of the subjects) to 9.
        prior_bits: -log2 of the answer's share among the answers of its relation; nan where unknown.
        majority: whether the answer is the most frequent of its relation, so that guessing finds it.
    """

    prompt: str
    answer: str
    options: tuple[str, ...]
    relation: str
    form: str
    exposures: int
    decile: int
    prior_bits: float
    majority: bool
