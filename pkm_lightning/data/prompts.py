"""Prompts to answer: set in the configuration or read from a file, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pkm_lightning.data.conversations import messages_of
from pkm_lightning.data.files import check_characters, expanded, read_text, require_file, split_lines
from pkm_lightning.data.readers.records import read_records
from pkm_lightning.data.template_renderer import Message
from pkm_lightning.errors import ConfigError, DataError

#: A text, or a conversation that a chat template renders.
Prompt = str | list[Message]


class PromptBatch(TypedDict):
    """Prompts with their numbers; number -1 marks a filler whose output must be dropped."""

    prompt: list[str]
    index: list[int]


def collect_prompts(prompts: Sequence[str], prompts_file: str | None) -> list[str]:
    """Returns the prompts of both keys, those of the configuration first.

    Raises:
        ConfigError: if there are none.
        DataError: if the file is missing, empty or not readable.
    """
    collected = list(prompts)
    if prompts_file is not None:
        collected += read_prompts(expanded(prompts_file))
    if not collected:
        raise ConfigError(
            "data.prompts=[] and data.prompts_file=null leave nothing to answer; give one of them, prompt=TEXT or "
            "prompts_file=FILE."
        )
    return collected


def check_prompts(prompts: object, key: str = "data.prompts") -> None:
    """Refuses values of `key` that are not texts: Hydra reads 007 as 7, 1e3 as 1000.0 and null as nothing.

    Raises:
        ConfigError: naming the value, and how to quote it.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise ConfigError(f"{key}={prompts} is not a list of texts; set {key}=[...].")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ConfigError(
                f"{key} holds {'null' if prompt is None else prompt}, which is not read as a text; quote every text: "
                f'\'{key}=["first","second"]\'.'
            )
        check_characters(f"{key}: {prompt!r}", prompt)


def read_prompts(path: Path, key: str = "data.prompts_file") -> list[str]:
    """Returns the prompts of a text file (one per line, blank lines skipped) or of a .jsonl file (field `prompt`).

    Raises:
        DataError: if the file is missing, empty or malformed.
    """
    require_file(f"{key}={path}", path, "set a text file with one prompt per line, or a .jsonl")
    if path.suffix == ".jsonl":
        prompts = [_prompt_field(f"{path}:{line}", record) for line, record in read_records(path)]
    else:
        prompts = [line for line in split_lines(read_text(path)) if line.strip()]
    if not prompts:
        raise DataError(f"{key}={path} is empty; write one prompt per line.")
    return prompts


def read_conversations(path: Path, key: str) -> list[Prompt]:
    """Returns the prompts as `read_prompts` does, and those lines of a .jsonl that have `messages` as conversations.

    Raises:
        DataError: if the file is missing, empty or malformed.
    """
    if path.suffix != ".jsonl" or not path.is_file():
        return list(read_prompts(path, key))
    prompts: list[Prompt] = []
    for line, record in read_records(path):
        where = f"{path}:{line}"
        has_messages = "messages" in record and "prompt" not in record
        prompts.append(messages_of(where, record, "messages") if has_messages else _prompt_field(where, record))
    return prompts or list(read_prompts(path, key))


def _prompt_field(where: str, record: dict[str, Any]) -> str:
    prompt = record.get("prompt")
    if "messages" in record and "prompt" not in record:
        raise DataError(f"{where} has messages, which generate puts into the model's chat template; this takes texts.")
    if not isinstance(prompt, str):
        raise DataError(f"{where} has no text field 'prompt' (fields present: {', '.join(record)}); add it.")
    check_characters(f"{where}: field 'prompt'", prompt)
    return prompt


class PromptBatches:
    """Batches of one rank: prompts r, r + W, ...; with fillers, so that every rank makes the same number of batches."""

    def __init__(self, prompts: Sequence[str], *, rank: int, world_size: int, batch_size: int) -> None:
        indices = list(range(rank, len(prompts), world_size))
        share = -(-len(prompts) // world_size)  # rounded up
        indices += [-1] * (share - len(indices))
        self._prompts = prompts
        self._batches = [indices[i : i + batch_size] for i in range(0, share, batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        # A filler repeats the first prompt: a forward through sharded parameters needs all ranks, and some text.
        for indices in self._batches:
            yield {"prompt": [self._prompts[max(i, 0)] for i in indices], "index": indices}
