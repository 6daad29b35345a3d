"""Parsers of the members: bytes to records, and why rows were left out.

Every parser refuses a member of another form in one sentence; a single row without a usable answer is left out and
counted.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pkm_lightning.data.benchmarks.subjects import CATEGORY
from pkm_lightning.errors import DataError

Record = dict[str, Any]
# A choice begins a line with its letter, as in "A. a marsh".
_CHOICE = re.compile(r"(?:^|\n)([A-E])\. ")
_LETTERS = "ABCDE"


@dataclass
class Parsed:
    """Records of a member, and the reasons for which rows were left out, with their numbers."""

    records: list[Record] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def tab_separated(content: bytes) -> Parsed:
    """Parses lines of question, tab, and a list of answers as Python writes it, quoted as in CSV."""
    parsed = Parsed()
    rows = csv.reader(io.StringIO(_text(content), newline=""), delimiter="\t")
    number = 0
    try:
        for number, (question, listed) in enumerate(rows, start=1):
            # A literal and no expression: the text is not executed.
            _add_open(parsed, question, ast.literal_eval(listed), number)
    except (ValueError, SyntaxError, MemoryError, RecursionError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"what follows row {number - 1} is not a question, a tab and a list of answers") from None
    return parsed


def open_lines(content: bytes) -> Parsed:
    """Parses JSON lines of `question` and `answer`, a list."""
    parsed = Parsed()
    for number, row in _json_rows(content, "question", "answer"):
        _add_open(parsed, row["question"], row["answer"], number)
    return parsed


def _add_open(parsed: Parsed, question: object, answers: object, number: int) -> None:
    if not isinstance(question, str) or not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"row {number} has no question with a list of answers")
    answers = [answer for answer in answers if answer.strip()]
    if answers and question.strip():
        parsed.records.append({"question": question.strip(), "answers": answers})
    else:
        parsed.skipped["no question or no answer"] += 1


def lettered(content: bytes, *, n: int) -> Parsed:
    """Parses JSON lines whose `options` are `n` lines such as "A. a marsh", and whose `answer` is one of them."""
    parsed = Parsed()
    for number, row in _json_rows(content, "question", "options", "answer"):
        options, answer, question = (_string(row, key, number) for key in ("options", "answer", "question"))
        _, *parts = _CHOICE.split(options)
        letters, choices = parts[::2], parts[1::2]
        letter, _, truth = answer.partition(". ")
        gold = letters.index(letter) if letter in letters else -1
        if letters != list(_LETTERS[:n]):
            parsed.skipped[f"choices that are not lettered A to {_LETTERS[n - 1]}"] += 1
        # The question mark of a few questions stands after their last choice instead.
        elif gold < 0 or choices[gold].removesuffix("?") != truth.removesuffix("?"):
            parsed.skipped["an answer that is none of the choices"] += 1
        else:
            choices[gold] = truth
            passage = {"passage": _string(row, "passage", number)} if "passage" in row else {}
            parsed.records.append({**passage, "question": question.strip(), "choices": choices, "gold": gold})
    return parsed


def yes_or_no(content: bytes) -> Parsed:
    """Parses JSON lines of `title`, `passage`, `question` and `answer`, "True" or "False"."""
    parsed = Parsed()
    for number, row in _json_rows(content, "title", "passage", "question", "answer"):
        title, passage, question = (_string(row, key, number) for key in ("title", "passage", "question"))
        if str(row["answer"]) not in ("True", "False"):
            parsed.skipped["an answer that is neither True nor False"] += 1
            continue
        parsed.records.append(
            {
                # As SuperGLUE, from which the harness's task reads, spells it.
                "passage": f"{title} -- {passage}",
                "question": question.strip(),
                "choices": ["no", "yes"],
                "gold": int(str(row["answer"]) == "True"),
            }
        )
    return parsed


def by_topic(content: bytes) -> Parsed:
    """Parses JSON lines of `question`, `answer_a` to `answer_d`, `correct_answer` (a letter) and `topic`."""
    parsed = Parsed()
    names = ("question", "answer_a", "answer_b", "answer_c", "answer_d", "correct_answer", "topic")
    for number, row in _json_rows(content, *names):
        question, *choices, letter, topic = (_string(row, key, number) for key in names)
        subject = topic.replace(" ", "_")
        if letter == "answer":
            parsed.skipped["header rows"] += 1
        elif letter not in tuple(_LETTERS[:4]):
            parsed.skipped["an answer that is none of the choices"] += 1
        elif subject not in CATEGORY:  # the name of a file
            parsed.skipped["a topic that is none of the 57 subjects"] += 1
        else:
            record = {"question": question.strip(), "choices": choices, "gold": _LETTERS.index(letter)}
            parsed.records.append({"subject": subject, **record})
    return parsed


def _json_rows(content: bytes, *fields: str) -> Iterator[tuple[int, Record]]:
    """Yields number and object of each line that is not blank.

    Raises:
        DataError: a line is no object with these fields.
    """
    # Not splitlines: texts hold U+2028 and other characters that it takes for ends of lines.
    for number, line in enumerate(_text(content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # Python refuses to convert more than 4,300 digits to an integer.
            row = json.loads(line, parse_int=float)
        except (ValueError, RecursionError):
            raise DataError(f"row {number} is not JSON") from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"row {number} has no {missing[0]}")
        yield number, row


def _string(row: Record, key: str, number: int) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"row {number}: {key} is not text")
    value: str = row[key]
    return value


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 at byte {error.start}") from None
