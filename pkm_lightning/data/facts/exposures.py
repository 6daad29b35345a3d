"""Exposures: how often training shows each fact, and in which of its forms.

One statement form is held out per fact, so that a question in this form tests the fact and not the form: the model has
learned the meaning of the form from other facts.
"""

from __future__ import annotations

import numpy as np

from pkm_lightning.data.facts.templates import FORMS, QUESTIONS, STATEMENTS


def exposure_counts(n: int, *, mean: float, distribution: str, exponent: float, maximum: int) -> np.ndarray:
    """Returns the exposures per fact for subjects of rank 1 to n.

    Args:
        n: number of subjects.
        mean: average over the subjects, from 1 to `maximum`.
        distribution: `uniform`, or `zipf`: rank to the power of -`exponent`.
        exponent: of the Zipf law; 0 is uniform.
        maximum: largest count. The scale of the law is raised until the clipped counts have the mean.

    Returns:
        (n,) int64, non-increasing, each from 1 to `maximum`.
    """
    power = exponent if distribution == "zipf" else 0.0
    law = np.arange(1, n + 1, dtype=np.float64) ** -power

    def clipped(scale: float) -> np.ndarray:
        return np.clip(np.rint(scale * law), 1, maximum).astype(np.int64)

    # Bisection: the mean of the clipped counts never falls as the scale rises; at `high` all counts are `maximum`.
    low, high = 0.0, (maximum + 1) / float(law[-1])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped(middle).mean() <= mean else (low, middle)
    return clipped(low)


def exposure_list(
    counts: np.ndarray, held_out: np.ndarray, questioned: np.ndarray, question_share: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns the exposures of one epoch, as codes fact * 16 + form.

    A fact cycles through its statement forms in its own random order, so that they appear equally often. Facts of
    questioned subjects spend `question_share` of their exposures, rounded at random, on the question forms.

    Args:
        counts: (facts,) exposures; 0 for facts that training never shows.
        held_out: (facts,) the statement form that is never shown of each fact.
        questioned: (facts,) bool.
        question_share: 0 to 1.
        rng: decides the orders and the rounding.

    Returns:
        (sum of counts,) int64, sorted by fact.
    """
    n = len(counts)
    facts = np.arange(n)
    priority = rng.random((n, len(STATEMENTS)))
    # The held-out form sorts last, and the cycle below leaves out the last place.
    priority[facts, held_out] = np.inf
    form_order = np.argsort(priority, axis=1)
    first_question = rng.integers(len(QUESTIONS), size=n)
    n_questions = np.floor(counts * question_share + rng.random(n)).astype(np.int64)
    n_questions = np.where(questioned, np.minimum(n_questions, counts), 0)

    # One entry per exposure: its fact, and its number among the exposures of this fact, questions first.
    fact = np.repeat(facts, counts)
    turn = np.arange(len(fact)) - np.repeat(np.cumsum(counts) - counts, counts)
    statement = form_order[fact, (turn - n_questions[fact]) % (len(STATEMENTS) - 1)]
    question = QUESTIONS.start + (turn + first_question[fact]) % len(QUESTIONS)
    codes: np.ndarray = fact * FORMS + np.where(turn < n_questions[fact], question, statement)
    return codes
