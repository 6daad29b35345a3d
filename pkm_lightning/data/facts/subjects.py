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
    for row in _parquet(folder / "People.parquet"):
        key = row["playerID"]
        year, month, day = row["birthYear"], row["birthMonth"], row["birthDay"]
        answers = {
            "birth_date": f"{MONTHS[month - 1]} {day}, {year}" if year and month and day else "",
            "birth_city": _clean(row["birthCity"]),
            "debut_year": str(row["debut"].year) if row["debut"] else "",
            "main_team": teams.get(key, ""),
            "college": colleges.get(key, ""),
        }
        if row["nameFirst"] and row["nameLast"]:
            named.append(_Named(_subject(f"{row['nameFirst']} {row['nameLast']}", answers), games[key], key))
    return _unique_by_prominence(named)


def load_countries() -> list[Subject]:
    """Returns countries and territories, by population."""
    countries = _json(PLACES.folder() / "countries.json")
    named = []
    for code, row in countries.items():
        answers = {
            "capital": _clean(row["capital"]),
            "currency": _clean(row["currencyname"]),
            "continent": CONTINENTS.get(row["continentcode"], ""),
            "internet_domain": _clean(row["tld"]),
        }
        named.append(_Named(_subject(row["name"], answers), int(row["population"]), code))
    return _unique_by_prominence(named)


def load_cities() -> list[Subject]:
    """Returns cities of more than 5,000 people whose name no other such city and no country has, by population."""
    folder = PLACES.folder()
    countries = {code: _clean(row["name"]) for code, row in _json(folder / "countries.json").items()}
    named = [
        _Named(_subject(row["name"], {"country": countries.get(row["countrycode"], "")}), int(row["population"]), key)
        for key, row in _json(folder / "cities5000.json").items()
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
    names = {(row["yearID"], row["teamID"]): _clean(row["name"]) for row in _parquet(folder / "Teams.parquet")}
    career: Counter[str] = Counter()
    by_team: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in _parquet(folder / "Appearances.parquet"):
        games = row["G_all"] or 0
        career[row["playerID"]] += games
        # A team keeps its identifier when it is renamed: names go by the year.
        by_team[row["playerID"]][names.get((row["yearID"], row["teamID"]), "")] += games
    main = {key: min(teams, key=lambda team: (-teams[team], team)) for key, teams in by_team.items()}
    return career, main


def _latest_colleges(folder: Path) -> dict[str, str]:
    schools = {row["schoolID"]: _clean(row["name_full"]) for row in _parquet(folder / "Schools.parquet")}
    rows = _parquet(folder / "CollegePlaying.parquet")
    # A later year overwrites an earlier one below.
    rows.sort(key=lambda row: (row["yearID"] or 0, row["schoolID"]))
    return {row["playerID"]: schools.get(row["schoolID"], "") for row in rows}


_COLUMNS = {
    "People.parquet": "playerID nameFirst nameLast birthYear birthMonth birthDay birthCity debut",
    "Appearances.parquet": "playerID yearID teamID G_all",
    "Teams.parquet": "yearID teamID name",
    "CollegePlaying.parquet": "playerID schoolID yearID",
    "Schools.parquet": "schoolID name_full",
}


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]  # part of the `facts` extra

    rows: list[dict[str, Any]] = parquet.read_table(path, columns=_COLUMNS[path.name].split()).to_pylist()
    return rows


def _json(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())
