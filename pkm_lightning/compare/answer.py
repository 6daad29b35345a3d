"""The answer of a comparison in one sentence, which claims no more than the intervals do.

| case | content of the sentence |
|---|---|
| the best mean is that of another variant than the reference, separated from it | how much more, with the interval |
| not separated from it | that it is not, and which other variants are |
| the reference has the best mean | who comes next, and by how much |
| nobody recalls more than chance | that, and nothing else |
| one value per variant | the difference, and that it has no interval |

Variants are separated if the interval of their difference excludes 0. The larger and smaller dense models of a ladder
take no part: they are there for the multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pkm_lightning.compare.conditions import conditions, in_a_row, meeting
from pkm_lightning.compare.pairs import Pair, best_first, pair
from pkm_lightning.compare.records import STILL_RUNNING
from pkm_lightning.compare.study import Study

# Variants that a sentence names before it counts the remaining ones.
_NAMED = 3


def answer(study: Study) -> str:
    """Returns the sentence, also where no run has results."""
    if study.resampled is None or study.reference is None:
        return "No run has results."
    ordered = ordered_candidates(study)
    lead = ordered[0]
    prefix = _prefix(study)
    if set(study.limits.floor).issuperset(ordered):
        chance = study.quality.format(study.limits.floor[lead])
        return f"{prefix}{_does(study, lead)}, no more than of subjects never trained ({chance})" + (
            ", and no other variant does." if len(ordered) > 1 else "."
        )
    if len(ordered) == 1:
        return (
            f"{prefix}{_does(study, lead)}{_brackets(study.quality.format_interval(*study.resampled.interval(lead)))}."
        )
    if lead == study.reference:
        return f"{prefix}{_of_reference(study, ordered)}."
    difference = pair(study.resampled, lead, study.reference)
    if not difference.has_interval:
        return (
            f"{prefix}{_does(study, lead)}, {in_words(study, difference)} than {study.reference}"
            f"{_at_other_moment(study, lead)}; without several seeds or questions this difference has no interval."
        )
    if difference.is_separated:
        return (
            f"{prefix}{_does(study, lead)}, {in_words(study, difference)} than {study.reference}"
            f"{_at_other_moment(study, lead)}{_against_others(study, lead, ordered[1:])}."
        )
    return f"{prefix}{_unseparated(study, lead, ordered, difference)}."


def ordered_candidates(study: Study) -> list[str]:
    """Returns the variants that the comparison is between, the best mean first."""
    candidates = study.candidates
    return [variant for variant in best_first(study) if variant in candidates]


def in_words(study: Study, difference: Pair) -> str:
    """Returns `34.6 points (32.5 to 36.5) more`; an interval that includes 0 keeps its signs."""
    quality, unit = study.quality, f" {study.quality.unit}" if study.quality.unit else ""
    word, sign = ("more", 1) if difference.difference >= 0 else ("less", -1)
    ends = sorted((sign * difference.low, sign * difference.high)) if difference.has_interval else []
    low, high = (quality.format_difference(end).removeprefix("+") for end in ends) if ends else ("", "")
    size = quality.format_difference(abs(difference.difference)).removeprefix("+")
    return f"{size}{unit}{_brackets(f'{low} to {high}' if ends else '')} {word}"


def _prefix(study: Study) -> str:
    """Returns the conditions that the sentence holds under."""
    n_seeds = {len(study.variants[variant]) for variant in study.candidates}
    few, many = min(n_seeds), max(n_seeds)
    seeds = "one seed" if many == 1 else f"{many} seeds" if few == many else f"{few} to {many} seeds"
    is_going_on = len(study.runs) < study.n_planned or any(run.failure == STILL_RUNNING for run in study.failed)
    so_far = "So far, " if is_going_on else ""
    text = f"{so_far}at {conditions(study)}, with {seeds}, "
    return text if so_far else text[0].upper() + text[1:]


def _does(study: Study, variant: str) -> str:
    assert study.resampled is not None
    return f"{variant} {study.quality.predicate(study.resampled.mean[variant])}"


def _of_reference(study: Study, ordered: Sequence[str]) -> str:
    """Returns the sentence for a reference that has the best mean."""
    assert study.resampled is not None
    reference, others = ordered[0], ordered[1:]
    differences = {other: pair(study.resampled, other, reference) for other in others}
    does = study.quality.predicate(study.resampled.mean[reference])
    first = f"no {_variant(study)} is better than {reference}, which {does}"
    following = f"next is {others[0]}, {in_words(study, differences[others[0]])}{_at_other_moment(study, others[0])}"
    if not differences[others[0]].has_interval:
        return f"{first}; {following}, a difference without an interval"
    unseparated = [other for other in others if not differences[other].is_separated]
    if not unseparated:
        return f"{first}; {following}"
    return f"{first}; {following}; not separated from {reference}: {_names(study, unseparated, reference)}"


def _unseparated(study: Study, lead: str, ordered: Sequence[str], difference: Pair) -> str:
    """Returns the sentence for a best mean that is not separated from the reference."""
    assert study.resampled is not None
    reference = str(study.reference)
    sign = 1 if study.quality.higher_is_better else -1
    pairs = {other: pair(study.resampled, other, reference) for other in ordered[1:] if other != reference}
    better = [other for other, one in pairs.items() if one.is_separated and sign * one.difference > 0]
    does = f"{_does(study, lead)}, {in_words(study, difference)} than {reference}{_at_other_moment(study, lead)}"
    if better:
        return f"{does}, an interval that includes 0; separated from {reference}: {_names(study, better, reference)}"
    others = f"no {_variant(study)} is separated from" if pairs else f"{lead} is not separated from"
    return f"{others} {reference}: {does}, an interval that includes 0"


def _against_others(study: Study, lead: str, others: Sequence[str]) -> str:
    """Returns how the best variant stands to those that are neither it nor the reference."""
    assert study.resampled is not None
    rivals = [other for other in others if other != study.reference]
    unseparated = [other for other in rivals if not pair(study.resampled, other, lead).is_separated]
    if unseparated:
        return f"; not separated from it: {_names(study, unseparated, lead)}"
    return f"; it is separated from every other {_variant(study)}" if rivals else ""


def _variant(study: Study) -> str:
    return "variant outside the dense ladder" if len(study.candidates) < len(study.variants) else "variant"


def _names(study: Study, variants: Sequence[str], than: str) -> str:
    """Lists variants with their differences from `than`."""
    assert study.resampled is not None
    unit = f" {study.quality.unit}" if study.quality.unit else ""
    shown = []
    for variant in variants[:_NAMED]:
        one = pair(study.resampled, variant, than)
        size, _, ends = study.quality.format_difference(one.difference, one.low, one.high).partition(" (")
        shown.append(f"{variant} ({size}{unit}{', ' if ends else ''}{ends.removesuffix(')')})")
    more = [f"{len(variants) - _NAMED} more"] if len(variants) > _NAMED else []
    return in_a_row([*shown, *more])


def _at_other_moment(study: Study, variant: str) -> str:
    """Returns both figures where the reference ends: in seconds for runs of equal tokens, else in tokens."""
    met = meeting(study)
    one, other = met.quality[variant], met.quality[str(study.reference)]
    if not (math.isfinite(one) and math.isfinite(other)):
        return ""
    write = study.quality.format
    return f", and at equal {met.axis}, by validations during training, {write(one)} against {write(other)}"


def _brackets(text: str) -> str:
    return f" ({text})" if text else ""
