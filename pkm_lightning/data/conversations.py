"""Conversations as training data: rendered by a chat template, the loss on the assistant's answers.

The assistant's words are those that the template marks with `{% generation %}`. Without marks they are what a turn of
the assistant adds to the text that stands before an answer: the words and the end token, which `chat` waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pkm_lightning.data.documents import Segment
from pkm_lightning.data.files import check_characters
from pkm_lightning.data.readers.records import kind_of, unique_fields
from pkm_lightning.data.template_renderer import Message, TemplateRenderer
from pkm_lightning.errors import DataError

__all__ = ["CHATML", "DEFAULT_TEMPLATE", "conversation_segments", "messages_of"]

_ROLES = "['system', 'user', 'assistant', 'tool']"
#: For tokenizers without a template: its only control token is the end token, which every vocabulary has.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message.role not in {_ROLES} %}}"
    "{{ raise_exception('the role ' ~ message.role ~ ' is none of system, user, assistant, tool') }}"
    "{% endif %}"
    "{% set words = message.content | trim %}{% set words = ' ' ~ words if words else '' %}"
    "{{ message.role }}:"
    "{% if message.role == 'assistant' %}{% generation %}{{ words ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ words }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
#: `data.chat_template=chatml`: the turns of many public models, with control tokens of its own.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def messages_of(where: str, record: Any, field: str) -> list[Message]:
    """Returns the turns in `field` of a record.

    Raises:
        DataError: naming the place and the turn, if it holds no list of objects with `role` and `content`.
    """
    turns = record.get(field)
    if not isinstance(turns, list) or not turns:
        problem = "is missing" if field not in record else "is empty" if turns == [] else "is no list of messages"
        raise DataError(
            f"{where}: field '{field}' {problem} (fields present: {', '.join(record)}); give a list of objects with "
            "role and content, or set data.messages_field."
        )
    return [_message(f"{where}: message {number} of '{field}'", turn) for number, turn in enumerate(turns, start=1)]


def _message(where: str, turn: Any) -> Message:
    if isinstance(turn, tuple) and all(isinstance(pair, tuple) for pair in turn):
        turn = unique_fields(where, turn)
    if not isinstance(turn, dict):
        raise DataError(f"{where} is a JSON {kind_of(turn)}; each must be an object with role and content.")
    # Fields that are null say that there is nothing, as in files where all messages have the same fields.
    fields = {name: value for name, value in turn.items() if value is not None}
    for name in ("role", "content"):
        if not isinstance(fields.get(name), str):
            problem = "is not text" if name in fields else "is missing" if name not in turn else "is null"
            advice = "each message needs a role and a content, both texts"
            if isinstance(fields.get(name), list):
                problem, advice = "is a list of parts", "join the texts of its parts to one; images are not read"
            raise DataError(f"{where}: '{name}' {problem} (fields present: {', '.join(turn)}); {advice}.")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: '{name}' is a JSON {kind_of(value)}; only texts can be rendered, remove it.")
        check_characters(f"{where}: '{name}'", value)
    return fields


def conversation_segments(
    renderer: TemplateRenderer, conversations: Sequence[tuple[str, list[Message]]]
) -> Iterator[tuple[Segment, ...]]:
    """Yields the segments of conversations, rendered in one request.

    What follows the last answer is left out: nothing of it is learned.

    Args:
        renderer: of the template.
        conversations: places for messages, and messages.

    Raises:
        DataError: naming the place, if the template refuses a conversation or nothing of it is learned.
        ConfigError: the template does not end, or takes too much memory.
    """
    request = {"task": "segments", "conversations": [messages for _, messages in conversations]}
    for (where, _), result in zip(conversations, renderer.ask(request)["results"], strict=True):
        if "error" in result:
            raise DataError(f"{where}: the chat template {renderer.source} refuses the messages ({result['error']}).")
        segments = _up_to_last_answer(result["segments"], renderer)
        if not segments:
            raise DataError(
                f"{where} holds no answer, and nothing else is learned; add a message of the role assistant, or remove "
                "the record."
            )
        yield segments


def _up_to_last_answer(segments: Sequence[Sequence[Any]], renderer: TemplateRenderer) -> tuple[Segment, ...]:
    """Returns the segments up to the last one that is learned, without the end token, which ends every document."""
    learned = [number for number, (_, is_learned) in enumerate(segments) if is_learned]
    if not learned:
        return ()
    *others, (text, _) = segments[: learned[-1] + 1]
    last = text.removesuffix(renderer.names["eos_token"])
    return (*(Segment(text, is_learned, True) for text, is_learned in others), Segment(last, True, True))
