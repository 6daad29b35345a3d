"""Conversations as the text that a model was trained on: a Jinja template, as Hugging Face's `chat_template.jinja`.

A template comes with a model, so it runs in Jinja's sandbox, in which it can read what it is given and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pkm_lightning.errors import ConfigError

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec

#: A turn: its `role` (`system`, `user`, `assistant`) and `content`.
Message = dict[str, str]

#: Stands for an answer where only what follows it is of interest.
_ANSWER = "ANSWER"


class _Generation(Extension):
    """The block `{% generation %}`, with which templates mark the assistant's words for training; it renders as is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the statements within the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A model's chat template with its tokenizer.

    Args:
        text: of the template.
        tokenizer: its `encode_rendered` reads control tokens by name; without one they are plain text.
        source: where the template comes from, for messages.

    Raises:
        ConfigError: the template cannot be read.
    """

    def __init__(self, text: str, tokenizer: TextCodec, source: Path) -> None:
        self._source = source
        self._encode = getattr(tokenizer, "encode_rendered", tokenizer.encode)
        self._tokenizer = tokenizer
        # The settings that templates are written for: a line with a block only leaves no line behind.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.globals |= getattr(tokenizer, "control_tokens", {"bos_token": "", "eos_token": ""})
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise self._error(error) from None

    def render(self, messages: Sequence[Message], *, answer_follows: bool = True) -> str:
        """Returns the text of a conversation, ending where the assistant's answer begins.

        Raises:
            ConfigError: the template refuses the conversation, such as two turns of one role.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=answer_follows, tools=None)
        except Exception as error:  # a template runs any expression, and so raises anything
            raise self._error(error) from None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of `render`."""
        ids: list[int] = self._encode(self.render(messages))
        return ids

    def end_ids(self) -> list[int]:
        """Returns the control token that follows an answer, which models of several end tokens write; or nothing."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
        after = self.render(turns, answer_follows=False).rpartition(_ANSWER)[2].strip()
        ids = self._encode(after)
        # A control token is no text. What is text, such as a line break, may stand within an answer.
        return [] if not ids or self._tokenizer.decode(ids[:1]) else ids[:1]

    def _error(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(f"{self._source}: the chat template cannot be used ({reason}).")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
