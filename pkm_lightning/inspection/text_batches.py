"""Texts of a file as batches: lines, or records with a text, or with a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkm_lightning.data.base import RecallItem, TextCodec, answer_ids, prompt_ids
from pkm_lightning.data.files import check_characters, read_text, require_file, split_lines
from pkm_lightning.data.readers.records import read_records
from pkm_lightning.errors import DataError
from pkm_lightning.inspection.windows import DEFAULT_CONTEXT

#: A text, or a question with its answer.
Statement = str | RecallItem


def read_statements(path: Path, key: str) -> list[Statement]:
    """Returns the lines of a text file, or of a .jsonl file each `text`, or `prompt` and `answer`.

    Raises:
        DataError: the file is missing, empty or malformed.
    """
    require_file(f"{key}={path}", path, "set a text file with one text per line, or a .jsonl")
    if path.suffix == ".jsonl":
        statements: list[Statement] = [_statement(f"{path}:{line}", record) for line, record in read_records(path)]
    else:
        statements = [line for line in split_lines(read_text(path)) if line.strip()]
    if not statements:
        raise DataError(f"{key}={path} is empty; write one text per line.")
    return statements


def _statement(where: str, record: dict[str, Any]) -> Statement:
    text, prompt, answer = (record.get(name) for name in ("text", "prompt", "answer"))
    for value in (text, prompt, answer):
        if isinstance(value, str):
            check_characters(where, value)
    if isinstance(prompt, str) and isinstance(answer, str):
        return RecallItem(prompt, answer, (), "", "fact", 0, 0, float("nan"), False)
    if isinstance(text, str):
        return text
    raise DataError(
        f"{where} has neither a text field 'text' nor 'prompt' and 'answer' ({', '.join(record)}); add one."
    )


def text_batches(
    tokenizer: TextCodec, statements: Sequence[Statement], *, context: int | None, batch_size: int, most_tokens: int
) -> Iterator[dict[str, Tensor]]:
    """Yields batches of the statements, padded on the right, until `most_tokens` have been read.

    Args:
        tokenizer: of the model.
        statements: texts longer than `context` are cut into several sequences.
        context: most tokens per sequence; None: 1,024.
        batch_size: sequences per batch.
        most_tokens: padding does not count.
    """
    length, tokens = DEFAULT_CONTEXT if context is None else context, 0
    waiting: list[list[int]] = []
    for statement in statements:
        if tokens >= most_tokens:
            break
        ids = _ids(tokenizer, statement)[: most_tokens - tokens]
        tokens += len(ids)
        waiting += [ids[start : start + length] for start in range(0, len(ids), length)]
        while len(waiting) >= batch_size:
            yield _batch(waiting[:batch_size])
            del waiting[:batch_size]
    if waiting:
        yield _batch(waiting)


def _ids(tokenizer: TextCodec, statement: Statement) -> list[int]:
    if isinstance(statement, str):
        return prompt_ids(tokenizer, statement)
    return [*prompt_ids(tokenizer, statement.prompt), *answer_ids(tokenizer, statement.answer)]


def _batch(sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    shape = len(sequences), max(map(len, sequences))
    ids_BT, valid_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        valid_BT[row, : len(ids)] = True
    return {"input_ids": ids_BT, "valid": valid_BT}
