"""The rendering of a chat template, which is a program, so that time and memory can be limited.

A template comes with a model of somebody else. Jinja's sandbox keeps it from files and from Python's internals, and not
from loops without end or texts that fill the memory. The program reads `{"template", "globals", "messages",
"answer_follows"}` as JSON and writes `{"text"}` or `{"error"}`; without `messages` it only compiles the template. Its
argument is the seconds that it may compute. It imports nothing of this package, so that it starts in a moment.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Bytes of memory, and characters of a conversation: more than the templates of public models take by far.
MEMORY, CHARACTERS = 2**30, 2**24


class _Generation(Extension):
    """The block `{% generation %}`, with which templates mark the assistant's words for training; it renders as is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the statements within the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _limit(seconds: int) -> None:
    """Ends this process after `seconds` of computing, and refuses memory beyond `MEMORY`."""
    # macOS has no limit of memory.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _render(request: dict[str, Any]) -> str:
    # The settings that templates are written for: a line with a block only leaves no line behind.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.globals |= request["globals"]
    template = environment.from_string(request["template"])
    if request["messages"] is None:
        return ""
    text = template.render(messages=request["messages"], add_generation_prompt=request["answer_follows"], tools=None)
    if len(text) > CHARACTERS:
        raise TemplateError(f"it renders {len(text):,} characters, more than {CHARACTERS:,}")
    return text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": _render(request)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY / 2**30:g} GiB of memory"}
    except Exception as error:  # a template runs any expression, and so raises anything
        return {"error": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    _limit(int(sys.argv[1]))
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
