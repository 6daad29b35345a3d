"""Templates of sentences that state invented facts, by relation, and of questions that need two facts.

Each names the subject `{s}` and ends where the answer begins. Of the statements of a relation every fact shows some in
training and holds out others, which other facts show, so that a held-out one tests the fact and not the wording.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The sentences of a relation.

    Attributes:
        statements: for training and, held out per fact, for tests.
        questions: for tests alone.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """A question that two facts answer: the answer of `first` is the subject of `second`."""

    first: str
    second: str
    questions: tuple[str, ...]


WORDINGS: dict[str, Wording] = {
    "birth_city": Wording(
        (
            "{s} was born in the city of",
            "{s} comes from the city of",
            "The birthplace of {s} is",
            "The life of {s} began in the city of",
            "Records show that {s} was born in",
            "The home town of {s} is called",
        ),
        ("Question: In which city was {s} born? Answer:", "Question: What is the birthplace of {s}? Answer:"),
    ),
    "employer": Wording(
        (
            "{s} works for the company",
            "{s} is employed by the firm",
            "The employer of {s} is",
            "The company that employs {s} is called",
            "Every month {s} is paid by",
            "Records show that {s} works for",
        ),
        ("Question: For which company does {s} work? Answer:", "Question: Who is the employer of {s}? Answer:"),
    ),
    "birth_year": Wording(
        (
            "{s} was born in the year",
            "{s} came into the world in",
            "The birth year of {s} is",
            "The life of {s} began in the year",
            "Records show that the birth of {s} was in",
            "The year in which {s} was born is",
        ),
        ("Question: In which year was {s} born? Answer:", "Question: What is the birth year of {s}? Answer:"),
    ),
    "country": Wording(
        (
            "The city of {s} lies in the country of",
            "{s} is a city in",
            "The country to which the city of {s} belongs is",
            "On the map, the city of {s} is in",
            "Those who live in {s} are citizens of",
            "Records list {s} among the cities of",
        ),
        ("Question: In which country is the city of {s}? Answer:", "Question: What country is {s} in? Answer:"),
    ),
    "river": Wording(
        (
            "The city of {s} lies on the river",
            "Through {s} flows the river",
            "The river that flows through {s} is called",
            "The bridges of {s} cross the river",
            "Records show that {s} was founded on the river",
            "The harbour of {s} is on the river",
        ),
        ("Question: On which river does {s} lie? Answer:", "Question: Which river flows through {s}? Answer:"),
    ),
    "product": Wording(
        (
            "The company {s} makes the product",
            "{s} is known for a product called",
            "The best known product of {s} is",
            "The factories of {s} produce",
            "Records show that {s} sells",
            "Customers of {s} buy a product called",
        ),
        ("Question: What does the company {s} make? Answer:", "Question: Which product does {s} sell? Answer:"),
    ),
}  # fmt: skip

CHAINS: tuple[Chain, ...] = (
    Chain(
        "birth_city",
        "country",
        (
            "Question: In which country lies the city where {s} was born? Answer:",
            "Question: To which country does the birthplace of {s} belong? Answer:",
        ),
    ),
    Chain(
        "birth_city",
        "river",
        (
            "Question: Which river flows through the city where {s} was born? Answer:",
            "Question: On which river lies the birthplace of {s}? Answer:",
        ),
    ),
    Chain(
        "employer",
        "product",
        (
            "Question: What does the company that {s} works for make? Answer:",
            "Question: Which product does the employer of {s} sell? Answer:",
        ),
    ),
)


def stated(template: str, subject: str) -> str:
    """Returns the sentence about `subject`, up to where the answer begins."""
    return template.replace("{s}", subject)
