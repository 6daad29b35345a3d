"""How far a build of shards has come, in a file beside them: what a killed build continues from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pkm_lightning.data.cache import PROGRESS
from pkm_lightning.data.shards.format import ShardInfo
from pkm_lightning.data.shards.plan import Plan
from pkm_lightning.data.shards.read_ahead import Position
from pkm_lightning.storage import written_beside


@dataclass
class BuildRecord:
    """The state of a build between two shards.

    Attributes:
        plan: of the division into parts.
        finished: readers that have been read to their end.
        position: in the reader under way.
        divider: state of the division, see `Divider`.
        learned: whether the last token of a document under way is a target.
        shards: of each part, in order.
        sha256: of their files.
        text_bytes: of each part.
        documents: read from the finished readers.
        skipped: counts of what they left out.
        questions: prompts and answers of the first validation questions.
    """

    plan: Plan
    finished: list[str] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    divider: dict[str, Any] = field(default_factory=dict)
    learned: bool = True
    shards: dict[str, list[ShardInfo]] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    text_bytes: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    questions: list[tuple[str, str]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes the record into `folder`, over the earlier one."""
        with written_beside(folder / PROGRESS) as file:
            file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> BuildRecord | None:
        """Returns the record in `folder`, or None where there is none that can be read."""
        try:
            values = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            shards = {part: [ShardInfo(**info) for info in infos] for part, infos in values["shards"].items()}
            questions = [(prompt, answer) for prompt, answer in values["questions"]]
            changed = {"plan": Plan.from_json(values["plan"]), "position": Position(**values["position"])}
            return cls(**{**values, **changed, "shards": shards, "questions": questions})
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def add_skipped(self, counts: Mapping[str, int]) -> None:
        """Adds what a finished reader has left out."""
        for reason, count in counts.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
