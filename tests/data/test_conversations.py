"""Conversations: what of them is learned, by marks of a template and without, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.data.conversations import CHATML, DEFAULT_TEMPLATE, conversation_segments, messages_of
from pkm_lightning.data.documents import Segment
from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.jsonl import JsonlReader
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import DataError

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
#: CHATML without marks.
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "Yes, \u6f22\U0001f600."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": ""},
]


def segments(template: str, messages: list[dict[str, str]], names: dict[str, str] = NAMES) -> tuple[Segment, ...]:
    renderer = TemplateRenderer(template, names, "a template")
    try:
        return next(conversation_segments(renderer, [("a:1", messages)]))
    finally:
        renderer.close()


def learned(parts: tuple[Segment, ...]) -> list[tuple[str, bool]]:
    assert all(part.rendered for part in parts)
    return [(part.text, part.learned) for part in parts]


def test_answers_are_learned_with_the_token_that_ends_them() -> None:
    assert learned(segments(DEFAULT_TEMPLATE, TURNS)) == [
        ("system: Be brief.\nuser: Rome?\nassistant:", False),
        (" Yes, \u6f22\U0001f600.</s>", True),
        ("\nuser: Why?\nassistant:", False),
        ("", True),
    ], "the end token of a document follows the last segment, and is learned as it is"


def test_marks_and_prefixes_give_the_same_parts() -> None:
    marked, unmarked = (learned(segments(template, TURNS)) for template in (CHATML, UNMARKED))
    assert marked == unmarked
    assert [text for text, is_learned in marked if is_learned] == ["Yes, \u6f22\U0001f600.<|im_end|>", "<|im_end|>"]
    assert marked[2][0] == "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("{{ m.content }}\n", "Yes.\n"),  # no end token: the line break ends the answer
        ("{{ m.content }}END\n\n", "Yes.END"),
        (" {{ m.content | trim }}</s>", " Yes."),  # the end token of a document
        ("{{ m.content | upper }}END\n", "YES.END\n"),  # the words are not found: all of the turn
    ],
)
def test_an_answer_ends_with_its_end_token_or_line(answer: str, expected: str) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }} A:{% else %}" + answer
    template += "{% endif %}{% endfor %}"
    parts = segments(template, [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Yes."}])
    assert learned(parts) == [("Q Rome? A:", False), (expected, True)]


def test_what_follows_the_last_answer_is_left_out() -> None:
    parts = segments(CHATML, [*TURNS[:3], {"role": "user", "content": "Unanswered"}])
    assert [part.learned for part in parts] == [False, True]


REFUSED: dict[str, tuple[str, str]] = {
    "a template of alternating roles": ("{{ raise_exception('roles must alternate') }}", r"roles must alternate"),
    "answers that do not follow": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
        r"turn 3, an answer, does not continue what the template writes before an answer; mark answers with \{% gen",
    ),
    "answers that change": (
        "{% for m in messages %}{{ m.content if loop.last or m.role != 'assistant' }}{% endfor %}",
        r"writes an answer otherwise when further turns follow",
    ),
    "nothing marked": ("{% for m in messages %}{% endfor %}{% generation %}{% endgeneration %}", r"holds no answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_record_and_the_template(name: str) -> None:
    template, reason = REFUSED[name]
    with pytest.raises(DataError, match=rf"^a:1.*{reason}") as refusal:
        segments(template, TURNS)
    assert "a template" in str(refusal.value) or name == "nothing marked"


def test_a_refused_conversation_does_not_take_the_others_with_it() -> None:
    renderer = TemplateRenderer(DEFAULT_TEMPLATE, NAMES, "a template")
    made = conversation_segments(renderer, [("a:1", TURNS), ("a:2", [{"role": "robot", "content": "x"}])])
    assert len(next(made)) == 4
    with pytest.raises(DataError, match=r"a:2: the chat template .*the role robot is none of system, user, assistant"):
        next(made)
    renderer.close()


BAD: dict[str, tuple[Any, str]] = {
    "missing": ({"text": "a"}, r"field 'messages' is missing \(fields present: text\)"),
    "no list": ({"messages": "a"}, r"field 'messages' is no list of messages"),
    "empty": ({"messages": []}, r"field 'messages' is empty"),
    "a text": ({"messages": ["a"]}, r"message 1 of 'messages' is a JSON text; each must be an object"),
    "no role": ({"messages": [{"content": "a"}]}, r"message 1 of 'messages': 'role' is missing \(fields present: con"),
    "null": ({"messages": [{"role": "user", "content": None}]}, r"'content' is null"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        r"is a list of parts .*; join the texts of its",
    ),
    "a number": (
        {"messages": [{"role": "user", "content": 3}]},
        r"'content' is not text .*; each message needs a role",
    ),
    "calls": ({"messages": [{"role": "a", "content": "b", "tool_calls": [1]}]}, r"'tool_calls' is a JSON list; only"),
    "half a character": ({"messages": [{"role": "user", "content": "a\ud83d"}]}, r"'content' holds \\ud83d after 'a'"),
    "no answer": ({"messages": TURNS[:2]}, r"holds no answer, and nothing else is learned"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_named_with_their_line(tmp_path: Path, name: str) -> None:
    record, message = BAD[name]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in ({"messages": TURNS}, record)))
    fields = Fields(text="text", prompt="prompt", answer="answer", messages="messages")
    renderer = TemplateRenderer(DEFAULT_TEMPLATE, NAMES, "the default")
    reader = JsonlReader(str(tmp_path), endings=[".jsonl"], fields=fields, renderer=renderer)
    with pytest.raises(DataError, match=rf"a\.jsonl:2.*{message}"):
        list(reader.pieces())
    assert renderer._process is None, "no process is left"


def test_a_field_twice_is_refused_and_null_fields_are_not_there() -> None:
    twice = [(("role", "user"), ("content", "a"), ("content", "b"))]
    with pytest.raises(DataError, match=r"a:1: message 1 of 'm' has the field 'content' more than once"):
        messages_of("a:1", {"m": twice}, "m")
    nulls = [(("role", "user"), ("content", "a"), ("tool_calls", None))]
    assert messages_of("a:1", {"m": nulls}, "m") == [{"role": "user", "content": "a"}]


def test_thousands_of_conversations_are_rendered_per_second() -> None:
    renderer = TemplateRenderer(UNMARKED, NAMES, "a template")
    batch = [(f"a:{i}", TURNS) for i in range(64)]
    list(conversation_segments(renderer, batch))
    begin = time.perf_counter()
    for _ in range(10):
        list(conversation_segments(renderer, batch))
    # A tenth of what one idle core does: the machine may be busy.
    assert 640 / (time.perf_counter() - begin) > 500
    renderer.close()
