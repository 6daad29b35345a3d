"""What kind of record a corpus holds, and the segments of one: a text, a prompt with its answer, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any

from pkm_lightning.data.conversations import conversation_segments, messages_of
from pkm_lightning.data.documents import Segment
from pkm_lightning.data.readers.records import text_field
from pkm_lightning.data.template_renderer import TemplateRenderer

__all__ = ["Fields", "Kind", "record_segments"]

#: Conversations that are rendered in one request.
BATCH = 64


class Kind(Enum):
    """Of all records of a corpus."""

    QUESTION = "prompt and answer"
    CONVERSATION = "messages"
    TEXT = "text"


@dataclass(frozen=True)
class Fields:
    """Names of the fields (or columns) that hold the texts of a record.

    Attributes:
        text, prompt, answer: texts.
        messages: a list of objects with `role` and `content`.
        skip_nulls: whether records are left out in which a field that is read is null.
    """

    text: str
    prompt: str
    answer: str
    messages: str
    skip_nulls: bool = False

    def kind(self, present: Collection[str]) -> Kind:
        """Returns the kind of a corpus whose first record has the fields `present`."""
        if self.prompt in present and self.answer in present:
            return Kind.QUESTION
        return Kind.CONVERSATION if self.messages in present else Kind.TEXT

    def of(self, kind: Kind) -> list[str]:
        """Returns the fields that records of a kind are read for."""
        names = {Kind.QUESTION: [self.prompt, self.answer], Kind.CONVERSATION: [self.messages], Kind.TEXT: [self.text]}
        return names[kind]


def record_segments(
    records: Iterator[tuple[int, str, Mapping[str, Any]]],
    kind: Kind,
    fields: Fields,
    renderer: TemplateRenderer,
    present: Callable[[], Collection[str] | None] = lambda: None,
) -> Iterator[tuple[int, tuple[Segment, ...]]]:
    """Yields the numbers of records and their segments.

    Args:
        records: numbers, places for messages, and fields.
        kind: of all of them.
        fields: names.
        renderer: of conversations.
        present: returns the names of all fields, for messages.

    Raises:
        DataError: a field is missing or cannot be read; names the place.
    """
    if kind is not Kind.CONVERSATION:
        for number, where, record in records:
            texts = [text_field(where, record, name, present) for name in fields.of(kind)]
            # An answer brings the space that stands before it.
            yield (
                number,
                (Segment(texts[0]),)
                if kind is Kind.TEXT
                else (
                    Segment(texts[0], learned=False),
                    Segment(f" {texts[1]}"),
                ),
            )
        return
    while batch := list(islice(records, BATCH)):
        conversations = [(where, messages_of(where, record, fields.messages)) for _, where, record in batch]
        segments = conversation_segments(renderer, conversations)
        yield from zip((number for number, _, _ in batch), segments, strict=True)
