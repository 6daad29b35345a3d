"""Conversations as the text that a model was trained on: a Jinja template, as Hugging Face's `chat_template.jinja`.

A template comes with a model, so it runs in Jinja's sandbox, in which it can read what it is given and nothing else,
and in a process of its own with limits of time and memory (`template_process.py`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pkm_lightning.errors import ConfigError
from pkm_lightning.inference import template_process

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec

#: A turn: its `role` (`system`, `user`, `assistant`) and `content`.
Message = dict[str, str]

#: Stands for an answer where only what follows it is of interest.
_ANSWER = "ANSWER"
#: Seconds that a template may compute, and on the clock, where its process waits for a processor.
SECONDS, PATIENCE = 10, 60


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
        self._text, self._tokenizer, self._source = text, tokenizer, source
        self._encode = getattr(tokenizer, "encode_rendered", tokenizer.encode)
        self._end_ids: list[int] | None = None
        self._request(None, answer_follows=False)

    def render(self, messages: Sequence[Message], *, answer_follows: bool = True) -> str:
        """Returns the text of a conversation, ending where the assistant's answer begins.

        Raises:
            ConfigError: the template refuses the conversation, such as two turns of one role, or does not end.
        """
        return self._request(list(messages), answer_follows=answer_follows)

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

    def _request(self, messages: list[Message] | None, *, answer_follows: bool) -> str:
        names = getattr(self._tokenizer, "control_tokens", {"bos_token": "", "eos_token": ""})
        request = {"template": self._text, "globals": names, "messages": messages, "answer_follows": answer_follows}
        # -P: the folder of the program is no place to import from.
        command = [sys.executable, "-P", template_process.__file__, str(SECONDS)]
        try:
            done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise self._error(f"it has not ended after {PATIENCE} s") from None
        if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
            raise self._error(f"it has not ended after {SECONDS} s of computing")
        if done.returncode:
            raise self._error("it crashes Jinja")
        answer: dict[str, str] = json.loads(done.stdout)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer["text"]

    def _error(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._source}: the chat template cannot be used ({reason}).")
