"""`prepare data=invented`: invented facts as JSON lines, for `edit`, for `fit data=jsonl`, and for questions.

| file | one line per | fields |
|---|---|---|
| facts.jsonl | fact | prompt, answer, paraphrases (learned too), test_prompts (never learned), question |
| train.jsonl | statement that is learned | prompt, answer |
| composition.jsonl | question that two facts answer | prompt, answer |
| controls.jsonl | fact that is nowhere learned | prompt, answer |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pkm_lightning.data.facts.invented import InventedChoice, InventedFacts, invent
from pkm_lightning.errors import RunDirectoryError
from pkm_lightning.storage import folder_written_beside, open_regular

FACTS, TRAIN, COMPOSITION, CONTROLS = "facts.jsonl", "train.jsonl", "composition.jsonl", "controls.jsonl"


def write_invented(choice: InventedChoice, out: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Writes the facts of `choice` into the folder `out`, which is made, whole or not at all.

    Args:
        choice: determines the facts.
        out: the folder.
        overwrite: whether other invented facts in it are replaced.

    Returns:
        The number of lines by the name of the file; none where `out` already has these files.

    Raises:
        RunDirectoryError: `out` holds anything else, or cannot be written.
    """
    texts = {name: _lines(rows) for name, rows in _rows(invent(choice)).items()}
    entries = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if entries == texts.keys() and all(_content(out / name) == text for name, text in texts.items()):
        return {}
    if foreign := sorted(entries - texts.keys()) or (out.exists() and not out.is_dir()):
        holds = f"holds {foreign[0]}" if isinstance(foreign, list) else "is no folder"
        raise RunDirectoryError(f"out={out} {holds}, which is not of invented facts; choose a folder of their own.")
    if entries and not overwrite:
        raise RunDirectoryError(
            f"out={out} holds other invented facts; choose another folder, or replace them with overwrite=true."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_written_beside(out) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"out={out} cannot be written ({error.strerror}); choose another folder.") from None
    return {name: text.count("\n") for name, text in texts.items()}


def _rows(invented: InventedFacts) -> dict[str, list[dict[str, object]]]:
    facts = invented.facts
    return {
        FACTS: [
            {
                "prompt": fact.prompts[0],
                "answer": fact.answer,
                "paraphrases": fact.prompts[1:],
                "test_prompts": fact.test_prompts,
                "question": fact.question,
            }
            for fact in facts
        ],
        TRAIN: [{"prompt": prompt, "answer": fact.answer} for fact in facts for prompt in fact.prompts],
        COMPOSITION: [{"prompt": one.question, "answer": one.answer} for one in invented.chains],
        CONTROLS: [{"prompt": fact.prompts[0], "answer": fact.answer} for fact in invented.controls],
    }


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _content(path: Path) -> str | None:
    try:
        with open_regular(path, encoding="utf-8") as file:
            return str(file.read())
    except (OSError, ValueError):
        return None
