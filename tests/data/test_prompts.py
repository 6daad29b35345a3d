"""Prompts: shared out evenly over ranks; missing and malformed ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkm_lightning.data import FactsDataModule
from pkm_lightning.data.prompts import PromptBatches, collect_prompts
from pkm_lightning.errors import ConfigError, DataError


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_prompt_once_and_equal_numbers_of_batches(ranks: int) -> None:
    prompts = [f"p{i}" for i in range(5)]
    shares = [list(PromptBatches(prompts, rank=r, world_size=ranks, batch_size=2)) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    pairs = [
        (i, text)
        for share in shares
        for batch in share
        for i, text in zip(batch["index"], batch["prompt"], strict=True)
    ]
    assert sorted(pair for pair in pairs if pair[0] >= 0) == list(enumerate(prompts))


def test_lists_and_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo à\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "three", "x": 1}\n')
    assert collect_prompts(["zero"], str(tmp_path / "p.txt")) == ["zero", "one", "two à"]
    assert collect_prompts([], str(tmp_path / "p.jsonl")) == ["three"]


def test_no_prompts_name_both_keys(prepared: FactsDataModule) -> None:
    with pytest.raises(ConfigError, match=r"data\.prompts=\[\] and data\.prompts_file=null"):
        prepared.predict_dataloader()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none\.txt does not exist"),
        ("empty.txt", b"\n \n", r"empty\.txt is empty; write one prompt per line"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"', r"bad\.jsonl:2 is not JSON"),
        (
            "field.jsonl",
            b'{"text": "a", "n": 1}',
            r"field\.jsonl:1 has no text field 'prompt' \(fields present: text, n\)",
        ),
        ("latin.txt", "é".encode("latin-1"), r"latin\.txt is not UTF-8 at byte 0"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        collect_prompts([], str(tmp_path / name))
