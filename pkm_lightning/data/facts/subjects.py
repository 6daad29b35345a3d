"""Subjects: people, countries and cities with unique names, most prominent first, with the answers about each."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.data.facts.sources import PEOPLE, PLACES

# Not from `calendar`: its names follow the locale of the machine.
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@dataclass(frozen=True)
class Subject:
    """A person or place that facts are about.

    Attributes:
        name: unique among the subjects of all domains.
        answers: the answer of each known relation.
    """

    name: str
    answers: dict[str, str]


@dataclass(frozen=True)
class _Named:
    subject: Subject
    prominence: int
    key: str


def load_people() -> list[Subject]:
    """Returns ballplayers with a unique full name, by games played."""
    folder = PEOPLE.folder()
    games, teams = _games_and_main_teams(folder)
    colleges = _latest_colleges(folder)
    named = []
    for record in _parquet(folder / "People.parquet"):
        key = record["playerID"]
        year, month, day = record["birthYear"], record["birthMonth"], record["birthDay"]
        answers = {
            "birth_date": f"{MONTHS[month - 1]} {day}, {year}" if year and month and day else "",
            "birth_city": _clean(record["birthCity"]),
            "debut_year": str(record["debut"].year) if record["debut"] else "",
            "main_team": teams.get(key, ""),
            "college": colleges.get(key, ""),
        }
        if record["nameFirst"] and record["nameLast"]:
            named.append(_Named(_subject(f"{record['nameFirst']} {record['nameLast']}", answers), games[key], key))
    return _unique_by_prominence(named)


def load_countries() -> list[Subject]:
    """Returns countries and territories, by population."""
    countries = _json(PLACES.folder() / "countries.json")
    named = []
    for code, record in countries.items():
        answers = {
            "capital": _clean(record["capital"]),
            "currency": _clean(record["currencyname"]),
            "continent": CONTINENTS.get(record["continentcode"], ""),
            "internet_domain": _clean(record["tld"]),
        }
        named.append(_Named(_subject(record["name"], answers), int(record["population"]), code))
    return _unique_by_prominence(named)


def load_cities() -> list[Subject]:
    """Returns cities of more than 5,000 people whose name no other such city and no country has, by population."""
    folder = PLACES.folder()
    countries = {code: _clean(record["name"]) for code, record in _json(folder / "countries.json").items()}
    named = [
        _Named(
            _subject(record["name"], {"country": countries.get(record["countrycode"], "")}),
            int(record["population"]),
            key,
        )
        for key, record in _json(folder / "cities5000.json").items()
    ]
    country_names = set(countries.values())
    return [city for city in _unique_by_prominence(named) if city.name not in country_names]


LOADERS: dict[str, Callable[[], list[Subject]]] = {
    "people": load_people,
    "countries": load_countries,
    "cities": load_cities,
}


def _subject(name: str, answers: dict[str, str]) -> Subject:
    return Subject(_clean(name), {relation: answer for relation, answer in answers.items() if answer})


def _unique_by_prominence(named: list[_Named]) -> list[Subject]:
    counts = Counter(item.subject.name for item in named)
    unique = [item for item in named if counts[item.subject.name] == 1 and item.subject.answers]
    # The key breaks ties, so that the order does not depend on that of the file.
    return [item.subject for item in sorted(unique, key=lambda item: (-item.prominence, item.key))]


def _games_and_main_teams(folder: Path) -> tuple[Counter[str], dict[str, str]]:
    """Returns career games of each player, and the team with most of them (the first in the alphabet on a tie)."""
    names = {
        (record["yearID"], record["teamID"]): _clean(record["name"]) for record in _parquet(folder / "Teams.parquet")
    }
    career: Counter[str] = Counter()
    by_team: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in _parquet(folder / "Appearances.parquet"):
        games = record["G_all"] or 0
        career[record["playerID"]] += games
        # A team keeps its identifier when it is renamed: names go by the year.
        by_team[record["playerID"]][names.get((record["yearID"], record["teamID"]), "")] += games
    main = {key: min(teams, key=lambda team: (-teams[team], team)) for key, teams in by_team.items()}
    return career, main


def _latest_colleges(folder: Path) -> dict[str, str]:
    schools = {record["schoolID"]: _clean(record["name_full"]) for record in _parquet(folder / "Schools.parquet")}
    records = _parquet(folder / "CollegePlaying.parquet")
    # A later year overwrites an earlier one below.
    records.sort(key=lambda record: (record["yearID"] or 0, record["schoolID"]))
    return {record["playerID"]: schools.get(record["schoolID"], "") for record in records}


_COLUMNS = {
    "People.parquet": "playerID nameFirst nameLast birthYear birthMonth birthDay birthCity debut",
    "Appearances.parquet": "playerID yearID teamID G_all",
    "Teams.parquet": "yearID teamID name",
    "CollegePlaying.parquet": "playerID schoolID yearID",
    "Schools.parquet": "schoolID name_full",
}


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet  # part of the `facts` extra

    records: list[dict[str, Any]] = parquet.read_table(path, columns=_COLUMNS[path.name].split()).to_pylist()
    return records


def _json(path: Path) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())
