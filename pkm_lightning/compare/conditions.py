"""What the variants of a comparison have in equal measure, and their quality at another moment than their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkm_lightning.compare.curves import quality_at
from pkm_lightning.compare.study import Study


@dataclass(frozen=True)
class Meeting:
    """The moment at which the reference ends, on the axis that the runs' lengths do not make equal.

    Args:
        axis: `seconds` for runs of equal tokens, `tokens` for runs of equal seconds.
        moment: on that axis.
        quality: mean over the runs of each variant, interpolated between their validations; nan where one is not known.
    """

    axis: str
    moment: float
    quality: dict[str, float]


def meeting(study: Study) -> Meeting:
    """Returns the moment and the quality of every variant there."""
    assert study.reference is not None
    axis = "tokens" if study.is_equal_time else "seconds"
    moment = study.mean_cost(study.reference, "tokens" if study.is_equal_time else "seconds_train")
    quality = {}
    for variant, runs in study.variants.items():
        values = [quality_at(run, study.quality, axis, moment) for run in runs]
        # A plain mean, nan if one is: a mean over some of the seeds would leave out exactly the slow ones.
        quality[variant] = sum(values) / len(values)
    return Meeting(axis, moment, quality)


def conditions(study: Study) -> str:
    """Returns what the candidates have in equal measure: `equal tokens and FLOPs per token (parameters differ)`."""
    length = "seconds" if study.is_equal_time else "tokens"
    equal = {length: not study.is_unequal_length}
    for label, name in (("FLOPs per token", "trunk_flops_forward"), ("parameters", "params_total")):
        is_equal = study.is_equal(name, study.candidates)
        if is_equal is not None and len(study.candidates) > 1:
            equal[label] = is_equal
    same = [label for label, is_equal in equal.items() if is_equal]
    other = [label for label, is_equal in equal.items() if not is_equal]
    if not same:
        return f"unequal {in_a_row(other)}"
    return f"equal {in_a_row(same)}" + (f" ({in_a_row(other)} differ)" if other else "")


def in_a_row(words: Sequence[str]) -> str:
    """Returns `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
