"""Files of facts: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import Letters

from pkm_lightning.adaptation.facts_file import Fact, check_lengths, read_facts
from pkm_lightning.errors import DataError

FULL: dict[str, Any] = {
    "prompt": "The capital of Zorland is",
    "answer": "Quix",
    "paraphrases": ["Zorland is governed from"],
    "test_prompts": ["The parliament of Zorland sits in"],
    "question": "Which town governs Zorland? It is",
}


def written(folder: Path, *lines: str) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_facts_are_read_and_recorded(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(FULL), "", json.dumps({"prompt": "A", "answer": "B", "question": None}))
    full, plain = read_facts(path)
    assert full.record() == FULL
    assert full.learned == (FULL["prompt"], *FULL["paraphrases"])
    assert plain == Fact("A", "B")
    assert plain.record() == {"prompt": "A", "answer": "B"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"facts.jsonl:2 is no JSON \(Expecting property name enclosed in double quotes at column 2\)"),
        ('{"prompt": ' + "9" * 5000 + "}", r"is no JSON \(a huge number\)"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "nested too deeply|no JSON"),
        ('{"prompt": "A", "prompt": "B", "answer": "C"}', "has the field 'prompt' twice"),
        ({"prompt": "A"}, "has no field 'answer'"),
        ({"answer": "A"}, "has no field 'prompt'"),
        ({"prompt": "A", "answer": 1}, "answer=1 is no text"),
        ({"prompt": None, "answer": "B"}, "prompt=null is no text"),
        ({"prompt": "A", "answer": " "}, "answer is blank"),
        ({"prompt": "", "answer": "B"}, "prompt is blank"),
        ({"prompt": "A", "answer": "B "}, "begins or ends with white space"),
        ({"prompt": "A ", "answer": "B"}, "ends with white space"),
        ({"prompt": "A", "answer": "B", "paraphrases": "C"}, 'paraphrases="C" is no list'),
        ({"prompt": "A", "answer": "B", "paraphrases": [3]}, "paraphrases=3 is no text"),
        ({"prompt": "A", "answer": "B", "paraphrases": [""]}, "paraphrases is blank"),
        ({"prompt": "A", "answer": "B", "test_prompts": ["A"]}, "has the prompt 'A' twice"),
        ({"prompt": "A", "answer": "B", "question": 1}, "question=1 is no text"),
        ({"prompt": "A", "answer": "B", "paraphrase": []}, "unknown field 'paraphrase'.*Did you mean 'paraphrases'"),
        ({"prompt": "A\udc80", "answer": "B"}, "half of a character"),
        ({"prompt": FULL["question"], "answer": "B"}, "stands at .*facts.jsonl:1 too"),
    ],
    ids=str,
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: Any, reason: str) -> None:
    path = written(tmp_path, json.dumps(FULL), line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(DataError, match=reason) as refusal:
        read_facts(path)
    assert f"{path}:2" in str(refusal.value)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"facts=.*missing.jsonl does not exist; give a .jsonl"):
        read_facts(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a directory"):
        read_facts(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        read_facts(written(tmp_path, " "))
    (tmp_path / "facts.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"facts.jsonl.gz is compressed; unpack it"):
        read_facts(tmp_path / "facts.jsonl.gz")


def test_prompts_longer_than_the_context() -> None:
    fact = Fact("abc", "de", test_prompts=("abcdef",))
    check_lengths([fact], Letters(), None)
    check_lengths([fact], Letters(), 9)  # "abcdef", " de": the end token is predicted, not read
    with pytest.raises(DataError, match=r"fact 1: abcdef has 10 tokens with its answer, .* sequences of 8"):
        check_lengths([fact], Letters(), 8)
