"""Conversations as the text that a model was trained on: a Jinja template, as Hugging Face's `chat_template.jinja`.

A template comes with a model, so it runs in Jinja's sandbox, in which it can read what it is given and nothing else,
and in a process of its own with limits of time and memory (`template_process.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pkm_lightning.data.template_renderer import Message, TemplateRenderer

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec

__all__ = ["ChatTemplate", "Message"]

#: Stands for an answer where only what follows it is of interest.
_ANSWER = "ANSWER"


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
        self._tokenizer = tokenizer
        self._encode = getattr(tokenizer, "encode_rendered", tokenizer.encode)
        names = getattr(tokenizer, "control_tokens", {"bos_token": "", "eos_token": ""})
        self._renderer = TemplateRenderer(text, names, str(source))
        self._end_ids: list[int] | None = None
        self._renderer.compile()
        self._renderer.close()

    def render(self, messages: Sequence[Message], *, answer_follows: bool = True) -> str:
        """Returns the text of a conversation, ending where the assistant's answer begins.

        Raises:
            ConfigError: the template refuses the conversation, such as two turns of one role, or does not end.
        """
        try:
            answer = self._renderer.ask({"task": "text", "messages": list(messages), "answer_follows": answer_follows})
        finally:
            # A conversation waits for a person between its turns: no process is kept for so long.
            self._renderer.close()
        if "error" in answer:
            raise self._renderer.error(answer["error"])
        text: str = answer["text"]
        return text

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of `render`."""
        ids: list[int] = self._encode(self.render(messages))
        return ids

    def end_ids(self) -> list[int]:
        """Returns the control token that follows an answer, which models of several end tokens write; or nothing."""
        if self._end_ids is None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
            after = self.render(turns, answer_follows=False).rpartition(_ANSWER)[2].strip()
            ids = self._encode(after)
            # A control token is no text. What is text, such as a line break, may stand within an answer.
            self._end_ids = [] if not ids or self._tokenizer.decode(ids[:1]) else ids[:1]
        return self._end_ids
