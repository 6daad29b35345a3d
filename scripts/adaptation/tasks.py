"""Task B: facts that the starting model does not know, in a folder of the files that `prepare data=invented` writes.

Draw 0 is for choosing settings, draw 1, 2, ... for the runs with these seeds: no draw shares a subject with another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from plans import SEEN_PEOPLE, Plan

from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.data.facts.invented import InventedChoice, TwoFactQuestion, invent
from pkm_lightning.data.facts.invented_files import COMPOSITION, CONTROLS, FACTS, TRAIN, write_invented
from pkm_lightning.data.facts.selection import FactsChoice, choose_facts
from pkm_lightning.data.facts.templates import QUESTIONS, STATEMENTS, prompt
from pkm_lightning.storage import folder_written_beside

#: Statements per fact that are learned.
SHOWN = 4
_RELATIONS = ("birth_date", "birth_city", "debut_year")


def task_folder(plan: Plan, folder: Path, draw: int) -> Path:
    """Returns the folder of the facts of a draw, written if it is missing."""
    out = folder / f"{plan.task}-{plan.n_facts}-{draw}"
    if plan.task == "invented":
        write_invented(_invented(plan, draw), out)
    elif not out.exists():
        facts = ballplayers(plan.n_facts, draw)
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_written_beside(out) as part:
            _write(part / FACTS, (fact.record() for fact in facts))
            _write(part / TRAIN, ({"prompt": p, "answer": fact.answer} for fact in facts for p in fact.learned))
    return out


def further_questions(folder: Path) -> list[Path]:
    """Returns the files of questions beside the facts: of two facts, and controls; none that is empty."""
    files = (folder / name for name in (COMPOSITION, CONTROLS))
    return [file for file in files if file.exists() and file.stat().st_size]


def chains(plan: Plan, draw: int) -> tuple[TwoFactQuestion, ...]:
    """Returns the questions that two facts of the draw answer, with both facts."""
    return invent(_invented(plan, draw)).chains if plan.task == "invented" else ()


def _invented(plan: Plan, draw: int) -> InventedChoice:
    return InventedChoice(n_facts=plan.n_facts, shown=SHOWN, controls=20, seed=0, draw=draw)


def ballplayers(n_facts: int, draw: int) -> list[Fact]:
    """Returns facts about people whom the default run has not seen."""
    choice = FactsChoice(
        people=-(-n_facts // len(_RELATIONS)), people_relations=_RELATIONS, countries=0, country_relations=(),
        cities=0, control_subjects=0, exposures=1, exposure_distribution="uniform", zipf_exponent=1.0, max_exposures=1,
        question_subjects=0.0, question_share=0.0, seed=0, eval_facts=1, draw=draw, skip=SEEN_PEOPLE,
    )  # fmt: skip
    facts = []
    for fact in choose_facts(choice)[:n_facts]:
        shown = [form for form in STATEMENTS if form != fact.held_out][:SHOWN]
        learned = [prompt(fact.relation, form, fact.subject) for form in shown]
        held_out = prompt(fact.relation, fact.held_out, fact.subject)
        question = prompt(fact.relation, QUESTIONS[0], fact.subject)
        facts.append(Fact(learned[0], fact.answer, tuple(learned[1:]), (held_out,), question))
    return facts


def _write(file: Path, rows: Iterable[object]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
