"""The rendering of a chat template, which is a program, so that time and memory can be limited.

A template comes with a model of somebody else. Jinja's sandbox keeps it from files and from Python's internals, and not
from loops without end or texts that fill the memory. The program `template_process.py SECONDS` takes one request of
JSON per line and writes one answer per line, each within SECONDS of computing. The first request is
`{"template", "globals"}` and its answer `{}`; the others:

| request | answer |
|---|---|
| `{"task": "text", "messages", "answer_follows"}` | `{"text"}` |
| `{"task": "segments", "conversations": [messages, ...]}` | `{"results": [{"segments": [[text, learned], ...]}]}` |

Where something cannot be rendered, `{"error"}` takes the place of its text. It imports nothing of this package, so that
it starts in a moment.
"""

from __future__ import annotations

import contextlib
import json
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Bytes of memory, and characters of a conversation: more than the templates of public models take by far.
MEMORY, CHARACTERS = 2**30, 2**24

Message = dict[str, str]
Segments = list[tuple[str, bool]]

#: Stands around the assistant's words; drawn anew for each process, so that no text can hold it.
_MARK = f"\x02{secrets.token_hex(16)}\x03"


class _Generation(Extension):
    """The block `{% generation %}`, with which templates mark the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns a call of `_marked` with what the block renders."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_MARK}{caller()}{_MARK}"


def _compiled(text: str, names: dict[str, str]) -> Template:
    # The settings that templates are written for: a line with a block only leaves no line behind.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.globals |= names
    return environment.from_string(text)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _marked_text(template: Template, messages: list[Message], answer_follows: bool) -> str:
    text = template.render(messages=messages, add_generation_prompt=answer_follows, tools=None)
    if len(text) > CHARACTERS:
        raise TemplateError(f"it renders {len(text):,} characters, more than {CHARACTERS:,}")
    return text


def _text(template: Template, messages: list[Message], answer_follows: bool) -> str:
    return _marked_text(template, messages, answer_follows).replace(_MARK, "")


def _segments(template: Template, messages: list[Message]) -> Segments:
    """Returns the text of a conversation in parts, of which the assistant's words are learned."""
    parts = _marked_text(template, messages, False).split(_MARK)
    if len(parts) > 1:
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]
    whole = parts[0]
    spans = [_answer_span(template, messages, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
    cuts = [0, *(place for begin, end, _ in spans for place in (begin, end)), len(whole)]
    if cuts != sorted(cuts) or not all(whole.startswith(text) for _, _, text in spans):
        raise TemplateError(
            "it writes an answer otherwise when further turns follow; mark answers with {% generation %} in it"
        )
    return [(whole[a:b], i % 2 == 1) for i, (a, b) in enumerate(pairwise(cuts)) if b > a]


def _answer_span(template: Template, messages: list[Message], turn: int) -> tuple[int, int, str]:
    """Returns where an answer begins and ends, its end token included, and the text up to the end of its turn."""
    prompt = _text(template, messages[:turn], True)
    text = _text(template, messages[: turn + 1], False)
    if not text.startswith(prompt):
        raise TemplateError(
            f"turn {turn + 1}, an answer, does not continue what the template writes before an answer; mark answers "
            "with {% generation %} in it"
        )
    content = messages[turn]["content"].strip()
    found = text.rfind(content, len(prompt)) if content else len(prompt)
    after = text[found + len(content) :] if found >= 0 else ""
    # A line break behind the end token belongs to the next turn; where there is no end token it ends the answer.
    end = len(text) - (len(after) - len(after.rstrip()) if after.strip() else 0)
    return len(prompt), end, text


def _result(template: Template, request: dict[str, Any]) -> dict[str, Any]:
    if request["task"] == "text":
        return {"text": _text(template, request["messages"], request["answer_follows"])}
    return {"results": [_guarded(partial(_conversation, template, turns)) for turns in request["conversations"]]}


def _conversation(template: Template, messages: list[Message]) -> dict[str, Any]:
    return {"segments": _segments(template, messages)}


def _guarded(render: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return render()
    except MemoryError:
        return {"error": f"it takes more than {MEMORY / 2**30:g} GiB of memory"}
    except Exception as error:  # a template runs any expression, and so raises anything
        return {"error": " ".join(str(error).split()) or type(error).__name__}


def _answers(seconds: int) -> Iterator[dict[str, Any]]:
    templates: list[Template] = []
    for line in sys.stdin:
        # A signal that nothing handles: it ends the process even within a single operation on a long text.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield _guarded(partial(_answer, json.loads(line), templates))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(request: dict[str, Any], templates: list[Template]) -> dict[str, Any]:
    """Returns the answer to a request; the first one brings the template, which is added to `templates`."""
    if not templates:
        templates.append(_compiled(request["template"], request["globals"]))
        return {}
    return _result(templates[0], request)


def _main() -> None:
    # macOS has no limit of memory.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for answer in _answers(int(sys.argv[1])):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
