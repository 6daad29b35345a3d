"""Facts to write into a model: a JSONL file, one object per line, each line checked before any work starts.

| field | content |
|---|---|
| `prompt` | a text that the model is to continue with the answer |
| `answer` | the continuation, without the space in front of it |
| `paraphrases` | further prompts with the same answer, which are learned too; may be missing |
| `test_prompts` | prompts that are never learned, whose exact match is reported; may be missing |
| `question` | a question with the same answer, likewise never learned; may be missing |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkm_lightning.data.base import TextCodec, answer_ids, prompt_ids
from pkm_lightning.data.files import COMPRESSED, check_characters, read_text, require_file, split_lines
from pkm_lightning.errors import DataError, nearest

_LISTS = ("paraphrases", "test_prompts")
_FIELDS = ("prompt", "answer", "paraphrases", "test_prompts", "question")


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        prompt: a text that the answer continues, without a trailing space.
        answer: the continuation, without a leading space.
        paraphrases: further prompts that are learned.
        test_prompts: prompts that are never learned.
        question: a further prompt that is never learned; None: there is none.

    Example:
        >>> from pkm_lightning.adaptation.facts_file import Fact
        >>> Fact("The capital of Zorland is", "Quix").learned
        ('The capital of Zorland is',)
    """

    prompt: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    test_prompts: tuple[str, ...] = ()
    question: str | None = None

    @property
    def learned(self) -> tuple[str, ...]:
        """The prompts that are learned."""
        return (self.prompt, *self.paraphrases)

    def record(self) -> dict[str, Any]:
        """Returns the fact as a line of the file holds it."""
        record: dict[str, Any] = {"prompt": self.prompt, "answer": self.answer}
        for name in _LISTS:
            if getattr(self, name):
                record[name] = list(getattr(self, name))
        return record if self.question is None else {**record, "question": self.question}


def read_facts(path: Path, key: str = "facts") -> list[Fact]:
    """Returns the facts of a file, in its order.

    Args:
        path: of the file.
        key: that `path` is the value of, for messages.

    Raises:
        DataError: naming file and line: the file is missing or empty, a line is no JSON object, a field is missing,
            blank, unknown or of another kind, or a prompt occurs twice.
    """
    remedy = 'give a .jsonl with one object per line: {"prompt": TEXT, "answer": TEXT}'
    require_file(f"{key}={path}", path, remedy)
    if path.suffix in COMPRESSED:
        raise DataError(f"{key}={path} is compressed; unpack it.")
    lines = [(number, line) for number, line in enumerate(split_lines(read_text(path)), 1) if line.strip()]
    if not lines:
        raise DataError(f"{key}={path} is empty; {remedy}.")
    facts: list[Fact] = []
    places: dict[str, str] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        facts.append(parse_fact(where, _parsed(where, line)))
        _check_distinct(where, facts[-1], places)
    return facts


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=lambda pairs: _without_repeats(where, pairs))
    except RecursionError:
        raise DataError(f"{where} is nested too deeply to be a fact; write one flat JSON object.") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        # The line in the message of a JSONDecodeError is always 1, and other errors name settings of Python.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "a huge number"
        raise DataError(f'{where} is no JSON ({reason}); write {{"prompt": TEXT, "answer": TEXT}}.') from None


def _without_repeats(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{where} has the field {repeated!r} twice; leave one out.")
    return dict(pairs)


def parse_fact(where: str, record: Any) -> Fact:
    """Returns the fact of one JSON value.

    Args:
        where: the value comes from, for messages.
        record: the value.

    Raises:
        DataError: as `read_facts`.
    """
    if not isinstance(record, dict):
        raise DataError(f'{where} is no JSON object; write {{"prompt": TEXT, "answer": TEXT}}.')
    for name in record:
        if name not in _FIELDS:
            raise DataError(
                f"{where} has an unknown field {name!r}; allowed: {', '.join(_FIELDS)}.{nearest(name, _FIELDS)}"
            )
    for name in ("prompt", "answer"):
        if name not in record:
            raise DataError(f"{where} has no field {name!r} (fields present: {', '.join(record) or 'none'}); add it.")
    question = record.get("question")
    fact = Fact(
        _text(where, "prompt", record["prompt"]),
        _text(where, "answer", record["answer"]),
        _texts(where, "paraphrases", record.get("paraphrases", [])),
        _texts(where, "test_prompts", record.get("test_prompts", [])),
        None if question is None else _text(where, "question", question),
    )
    if fact.answer != fact.answer.strip():
        raise DataError(f"{where}: answer {fact.answer!r} begins or ends with white space; the model adds the space.")
    prompts = (*fact.learned, *fact.test_prompts, *(() if fact.question is None else (fact.question,)))
    for prompt in prompts:
        if prompt != prompt.rstrip():
            raise DataError(
                f"{where}: prompt {prompt!r} ends with white space; leave it out: the model adds the space."
            )
        if prompts.count(prompt) > 1:
            raise DataError(f"{where} has the prompt {prompt!r} twice; leave one out.")
    return fact


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}={json.dumps(value)[:40]} is no text; quote it.")
    if not value.strip():
        raise DataError(f"{where}: {name} is blank; write a text.")
    check_characters(f"{where}: field '{name}'", value)
    return value


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name}={json.dumps(value)[:40]} is no list; write [TEXT, ...].")
    return tuple(_text(where, name, text) for text in value)


def _check_distinct(where: str, fact: Fact, places: dict[str, str]) -> None:
    """Refuses a prompt that an earlier line has: with another answer it contradicts, with the same it is a repeat."""
    prompts = (*fact.learned, *fact.test_prompts, *(() if fact.question is None else (fact.question,)))
    for prompt in prompts:
        if prompt in places:
            raise DataError(f"{where}: the prompt {prompt!r} stands at {places[prompt]} too; leave one out.")
        places[prompt] = where


def check_lengths(facts: Sequence[Fact], tokenizer: TextCodec, context: int | None) -> None:
    """Refuses prompts that together with their answers have more tokens than the model reads.

    Args:
        facts: to be written.
        tokenizer: of the model.
        context: tokens per sequence in training; None for any number.

    Raises:
        DataError: naming the fact, the prompt and both numbers.
    """
    if context is None:
        return
    for number, fact in enumerate(facts, 1):
        answer = len(answer_ids(tokenizer, fact.answer)) + 1
        for prompt in (*fact.learned, *fact.test_prompts, *(() if fact.question is None else (fact.question,))):
            length = len(prompt_ids(tokenizer, prompt)) + answer
            if length - 1 > context:
                raise DataError(
                    f"fact {number}: {prompt:.60} has {length} tokens with its answer, and the model was trained on "
                    f"sequences of {context}; shorten it."
                )
