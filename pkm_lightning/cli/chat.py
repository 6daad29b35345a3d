"""`chat`: a conversation in the terminal. Ctrl-C ends an answer, Ctrl-D or /exit the conversation.

A model with a chat template sees the whole conversation, of which each turn reads only what is new. Any other model
continues each line by itself. From a pipe each line is a message, and the output has the answers alone.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

from pkm_lightning.build.loading import LoadedModel
from pkm_lightning.cli.command_keys import GENERATION_KEYS
from pkm_lightning.cli.generation import GenerationSettings, generation_settings, speed_line
from pkm_lightning.cli.job import Job, log_to_stderr
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.cli.streaming import Streamer
from pkm_lightning.data.chat_template import ChatTemplate, Message
from pkm_lightning.data.files import check_characters
from pkm_lightning.errors import ConfigError, DataError
from pkm_lightning.inference.generation import Answer, Generation, Speed
from pkm_lightning.inference.read_tokens import ReadTokens

_HELP = "/reset forgets the conversation; /exit or Ctrl-D ends it; Ctrl-C ends an answer."


def run(job: Job) -> None:
    """Answers line by line."""
    log_to_stderr()
    settings = generation_settings(job)
    system = job.config.system
    if system is not None and not isinstance(system, str):
        raise ConfigError(f"system={system} is not text; quote it: \"system='{system}'\".")
    loaded = load_of_job(job, (*GENERATION_KEYS, "system"))
    if loaded.chat_template is None and system is not None:
        raise ConfigError(f"system={system!r} needs a chat template, and {loaded.path} has none; leave it out.")
    conversation = Conversation(loaded, settings, system)
    print(f"{conversation.introduction} {_HELP}", file=sys.stderr)
    _converse(conversation)
    if conversation.answers:
        print(speed_line(conversation.speed, conversation.answers), file=sys.stderr)


class Conversation:
    """A model's part in a conversation.

    Args:
        loaded: the model, with its chat template if it has one.
        settings: of its answers.
        system: message of the system, or None.

    Attributes:
        answers: all answers so far.
        speed: tokens and seconds of all of them.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings, system: str | None) -> None:
        self._loaded, self._settings = loaded, settings
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
        self._context = settings.context(loaded.context)
        self._past = ReadTokens(loaded.model, self._context)
        self._template = None
        if loaded.chat_template is not None:
            self._template = ChatTemplate(loaded.chat_template, loaded.codec(), loaded.path)
        self.answers: list[Answer] = []
        self.speed = Speed()

    @property
    def introduction(self) -> str:
        """What the model will do with a line."""
        if self._template is None:
            return "The model has no chat template: it continues each line, and remembers none."
        return "The model answers with the whole conversation in view."

    def reset(self) -> None:
        """Forgets the conversation."""
        self._messages = list(self._first)
        self._past.forget()

    def answer(self, message: str) -> None:
        """Prints the answer while it is written; Ctrl-C ends it.

        Raises:
            ConfigError: the conversation has become longer than the model reads, or its template refuses it.
        """
        messages: list[Message] = [*self._messages, {"role": "user", "content": message}]
        context = self._context
        ids = self._template.encode(messages) if self._template else None
        if ids is not None and context is not None and len(ids) > context:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model was trained on sequences of {context}; /reset "
                "begins another one, and chat with extrapolate=true reads on."
            )
        streamer = Streamer(self._settings.sampling.stop)
        # Each answer of a conversation has draws of its own.
        number = len(self.answers)
        generation = Generation(
            self._loaded.model,
            self._loaded.codec(),
            [message] if ids is None else [ids],
            self._settings.sampling,
            device=self._loaded.device,
            context=context,
            numbers=[number],
            end_ids=self._template.end_ids() if self._template else (),
            past=self._past,
            watch=streamer,
        )
        ((answer,),) = generation.answers
        try:
            generation.run()
        except KeyboardInterrupt:
            generation.interrupt()
            streamer(answer)
        print(flush=True)
        self.answers.append(answer)
        self.speed += generation.speed
        if self._template:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]


def _converse(conversation: Conversation) -> None:
    if sys.stdin is None:  # closed
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on every system
            importlib.import_module("readline")  # gives `input` a history and editing
    while True:
        try:
            line = input("> ") if is_terminal else _next_line()
            check_characters("the message", line)
        except EOFError:
            if is_terminal:
                print()
            return
        except (DataError, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, DataError) else "the message is not UTF-8; convert it."
            print(f"error: {reason}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n/exit or Ctrl-D ends the conversation.", file=sys.stderr)
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            try:
                conversation.answer(line)
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # just before or after the answer was written
                print()


def _next_line() -> str:
    # Bytes: a line that is not UTF-8 must not take the others with it.
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8-sig").rstrip("\r\n")
