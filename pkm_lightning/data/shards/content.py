"""What prepared text holds, in words: files, documents, bytes and tokens per part, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pkm_lightning.data.shards.format import PARTS
from pkm_lightning.errors import counted

#: What reasons to leave something out begin with, such as `empty files`.
_NOUN = re.compile(r"\b(file|document|record)s\b")
_NAMES = {"train": "training", "validation": "validation", "test": "testing"}


def skipped_texts(index: Mapping[str, Any]) -> list[str]:
    """Returns what was left out, such as `1 empty file` or `2 files of other endings: .py`."""
    return [
        f"{n:,} {_NOUN.sub(_singular, reason, count=1) if n == 1 else reason}" for reason, n in index["skipped"].items()
    ]


def _singular(noun: re.Match[str]) -> str:
    return noun[1]


def content_lines(index: Mapping[str, Any]) -> list[str]:
    """Returns what `shards.json` says about its text: what was read, the parts, and what was skipped."""
    read = index["read"]
    counts = ", ".join(counted(read[noun + "s"], noun) for noun in ("file", "document", "byte"))
    parts = ", ".join(
        f"{counted(total['tokens'], 'token')} in {counted(total['documents'], 'document')} for {_NAMES[part]}"
        for part, total in part_totals(index).items()
    )
    skipped = ", ".join(skipped_texts(index))
    return [f"read: {counts}", parts, *([f"skipped: {skipped}"] if skipped else [])]


def content_table(index: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table with a row per part."""
    rows: list[tuple[str, ...]] = [("part", "documents", "bytes of text", "tokens", "targets", "shards")]
    for part, total in part_totals(index).items():
        rows.append((part, *(f"{total[name]:,}" for name in ("documents", "bytes", "tokens", "targets", "shards"))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def part_totals(index: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns documents, tokens, targets, shards and bytes of text of each part that holds documents."""
    totals = {}
    for part in PARTS:
        shards = index["parts"].get(part, [])
        if shards:
            sums = {name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "targets")}
            totals[part] = {**sums, "shards": len(shards), "bytes": index.get("text_bytes", {}).get(part, 0)}
    return totals
