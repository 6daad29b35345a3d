"""Invented people: a name without repetition and values, all drawn uniformly and independently from sets of known size.

Letters: N people, K attributes, V words per value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pkm_lightning.data.base import FactSpace
from pkm_lightning.data.biographies.wording import ATTRIBUTES
from pkm_lightning.data.permutation import Permutation
from pkm_lightning.errors import ConfigError, check_integer

#: First, middle and last name, as in bioS of Allen-Zhu and Li (arXiv 2404.05405).
NAME_WORDS = 3


@dataclass(frozen=True)
class PeopleChoice:
    """The keys of `data=biographies` that determine the people; see configs/data/biographies.yaml.

    Raises:
        ConfigError: for a value out of range, or more people than names.
    """

    people: int
    words: int
    attributes: int
    value_words: int
    seed: int
    draw: int

    def __post_init__(self) -> None:
        check_integer("data.people", self.people, 1, 10**7)
        check_integer("data.words", self.words, 2, 2**14)
        check_integer("data.attributes", self.attributes, 1, len(ATTRIBUTES))
        check_integer("data.value_words", self.value_words, 1, 4)
        check_integer("data.seed", self.seed, 0)
        check_integer("data.draw", self.draw, 0)
        if self.people * (self.draw + 1) > self.words**NAME_WORDS:
            raise ConfigError(
                f"data.people={self.people} in data.draw={self.draw} exceeds the names of data.words={self.words}, of "
                f"which there are {self.words**NAME_WORDS:,} for all draws; set data.words="
                f"{_least_words(self.people * (self.draw + 1))} or more."
            )

    @property
    def space(self) -> FactSpace:
        """What the names and values were drawn from."""
        return FactSpace(
            people=self.people,
            names=self.words**NAME_WORDS,
            attributes=self.attributes,
            values=self.words**self.value_words,
        )


def draw_people(choice: PeopleChoice) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words of the names, (N, 3), and of the values, (N, K, V): numbers from 0 to `words` - 1.

    No name is drawn twice, in one draw or in two of them at the same seed.
    """
    n, words = choice.people, choice.words
    # Places of one permutation of all names: distinct, without a list of those that are taken.
    numbers_N = Permutation(words**NAME_WORDS, choice.seed, 0).at(choice.draw * n + np.arange(n))
    powers = words ** np.arange(NAME_WORDS)
    rng = np.random.Generator(np.random.PCG64([choice.seed, choice.draw]))
    values_NKV = rng.integers(words, size=(n, choice.attributes, choice.value_words))
    return numbers_N[:, None] // powers % words, values_NKV


def _least_words(names: int) -> int:
    words = round(names ** (1 / NAME_WORDS))
    return words if words**NAME_WORDS >= names else words + 1
