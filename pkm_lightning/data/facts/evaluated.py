"""Which facts the test asks about and which validations do: no fact is in both, so that what was chosen by validation
figures has not been chosen by what is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from pkm_lightning.data.facts.selection import Fact

#: Of so many facts validations get one at most.
_FACTS_PER_VALIDATION_FACT = 4


def divide_sample(facts: Sequence[Fact], sample: np.ndarray, eval_facts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the part of `sample` for the test and the part for validations, each in the order of `sample`.

    Validations get up to `eval_facts` of the trained subjects with questions, of those without, and of the controls,
    the last of each, and no more than a quarter: the first of each stay with the test, whatever validations take.

    Args:
        facts: all facts, controls included.
        sample: (facts,) numbers of all facts in random order.
        eval_facts: facts that an evaluation asks about.

    Returns:
        Two arrays of fact numbers without a common one; the second is empty where there are too few trained facts to
        divide.
    """
    groups: defaultdict[tuple[bool, bool], list[int]] = defaultdict(list)
    for i in sample.tolist():
        groups[facts[i].control, facts[i].questioned].append(i)
    for_validation: list[int] = []
    for group in groups.values():
        n = min(eval_facts, len(group) // _FACTS_PER_VALIDATION_FACT)
        for_validation += group[len(group) - n :]
    if all(facts[i].control for i in for_validation):  # validations ask what the test asks, which keeps the controls
        for_validation = []
    is_for_validation = np.isin(sample, for_validation)
    return sample[~is_for_validation], sample[is_for_validation]
