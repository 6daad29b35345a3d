"""Prompts for `predict`: set in the configuration or read from a file, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pkm_lightning.data.files import read_records, read_text
from pkm_lightning.errors import ConfigError, DataError


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
    collected = [str(prompt) for prompt in prompts]
    if prompts_file is not None:
        collected += read_prompts(Path(prompts_file).expanduser())
    if not collected:
        raise ConfigError("data.prompts=[] and data.prompts_file=null leave nothing to predict; set one of them.")
    return collected


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a text file (one per line, blank lines skipped) or of a .jsonl file (field `prompt`).

    Raises:
        DataError: if the file is missing, empty or malformed.
    """
    if not path.is_file():
        raise DataError(
            f"data.prompts_file={path} does not exist; set a text file with one prompt per line, or a .jsonl."
        )
    if path.suffix == ".jsonl":
        prompts = [_prompt_field(where, record) for where, record in read_records(path)]
    else:
        prompts = [line for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"data.prompts_file={path} is empty; write one prompt per line.")
    return prompts


def _prompt_field(where: str, record: dict[str, Any]) -> str:
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{where} has no text field 'prompt' (fields present: {', '.join(record)}); add it.")
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
