"""Replayed data: exact shares, an order of position alone, figures of the new data held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_folders import text, write_folder

from pkm_lightning.data import FactsDataModule, TokensDataModule
from pkm_lightning.data.base import fingerprint_of
from pkm_lightning.data.replay import Replay
from pkm_lightning.data.tokenizer import bytes_tokenizer, train_bpe
from pkm_lightning.errors import ConfigError, DataError

OPTIONS: dict[str, Any] = {
    "packing": "none", "seq_len": 16, "global_batch_size": 10, "num_workers": 0, "order_seed": 3, "prompts": [],
    "prompts_file": None, "val_path": None, "test_path": None,
}  # fmt: skip


def source(root: Path, words: str, count: int, **options: Any) -> TokensDataModule:
    documents = {"train": [text(f"{words}{n}") for n in range(count)], "validation": [text(f"{words} held out")] * 3}
    folder = write_folder(root, documents, **{k: options.pop(k) for k in ("tokenizer", "name") if k in options})
    return TokensDataModule(**{**OPTIONS, "path": str(folder), "cache_dir": str(root / "cache"), **options})


def mixed(root: Path, share: float = 0.2, **options: Any) -> TokensDataModule:
    data = source(root, "new", 23, **options)
    data.replay = Replay(source(root, "old", 7), share, "finetune.replay_path=old")
    return data


def words_of(batch: dict[str, torch.Tensor]) -> list[str]:
    return [
        bytes_tokenizer().decode(ids[valid].tolist())
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
    ]


def test_each_block_has_its_share_and_each_source_its_epochs(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    data.prepare_data()
    batches = iter(data.train_dataloader())
    # A share of 0.2 is one of five: each global batch of ten holds exactly two.
    shown = [words_of(next(batches)) for _ in range(23 * 5)]
    assert all(sum(word.startswith("old") for word in batch) == 2 for batch in shown)
    counts = Counter(word for batch in shown for word in batch)
    assert {counts[f"new{n}"] for n in range(23)} == {40}
    assert sum(counts[f"old{n}"] for n in range(7)) == 230
    assert max(counts[f"old{n}"] for n in range(7)) - min(counts[f"old{n}"] for n in range(7)) == 1
    assert [word for batch in data.val_dataloader() for word in words_of(batch)] == ["new held out"] * 3
    assert data.passes(23) == pytest.approx(23 * 10 * 0.8 / 23)


def test_a_position_gives_the_same_sequences_whatever_came_before(tmp_path: Path) -> None:
    whole = mixed(tmp_path)
    whole.prepare_data()
    batches = iter(whole.train_dataloader())
    expected = [words_of(next(batches)) for _ in range(9)]
    state = {**whole.state_dict(), "samples": 60}
    resumed = mixed(tmp_path)
    resumed.prepare_data()
    resumed.load_state_dict(state)
    resumed._loaded_batches = 0  # which a Trainer restores
    batches = iter(resumed.train_dataloader())
    assert [words_of(next(batches)) for _ in range(3)] == expected[6:]
    other = mixed(tmp_path, share=0.3)
    with pytest.raises(DataError, match="not those that the checkpoint was trained on"):
        other.load_state_dict(state)
    plain = source(tmp_path, "new", 23)
    assert fingerprint_of(plain) == plain.fingerprint != fingerprint_of(whole)


@pytest.mark.parametrize(
    ("share", "places"), [(0.05, [19, 1]), (0.3333, [6667, 3333]), (0.5, [1, 1]), (0.001, [999, 1]), (0.999, [1, 999])]
)
def test_blocks_are_as_short_as_the_share_allows(share: float, places: list[int], tmp_path: Path) -> None:
    replay = Replay(source(tmp_path, "old", 2), share, "")
    assert sum(replay.places) <= 1000
    assert replay.places[1] / sum(replay.places) == pytest.approx(places[1] / sum(places), abs=1e-4)
    if sum(places) <= 1000:
        assert replay.places == places


@pytest.mark.parametrize("share", [0, 1, 0.0001, -0.1, 1.5])
def test_shares_of_nothing_and_all_are_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"finetune.replay_share={share} must be 0.001 to 0.999"):
        Replay(source(tmp_path, "old", 2), share, "")


def test_old_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    data = source(tmp_path, "new", 3)
    other = train_bpe(["old words"] * 9, 260)
    data.replay = Replay(source(tmp_path, "old", 3, tokenizer=other), 0.5, "finetune.replay_path=old")
    with pytest.raises(DataError, match=r"finetune\.replay_path=old was tokenised by another tokenizer"):
        data.prepare_data()


def test_earlier_facts_are_replayed_among_later_ones(facts: Callable[..., FactsDataModule]) -> None:
    """With the tokenizer of the earlier ones, as a run has it that starts from their weights."""
    old = facts(exposures=2)
    old.prepare_data()
    new = facts(draw=1, exposures=2, tokenizer=str(old.cache_folder() / "tokenizer.json"))
    new.replay = Replay(old, 0.25, "finetune.replay_path=old")
    new.prepare_data()
    old_subjects, new_subjects = ({fact.subject for fact in data.facts()} for data in (old, new))
    assert not old_subjects & new_subjects
    batch = next(iter(new.train_dataloader()))
    shown = [
        old.tokenizer.decode(ids[valid].tolist()) for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
    ]
    kinds = [(any(s in text for s in old_subjects), any(s in text for s in new_subjects)) for text in shown]
    assert Counter(kinds) == {(True, False): 2, (False, True): 6}
    asked = {item.prompt for item in new.recall_items(20)}
    assert asked
    assert not any(subject in prompt for subject in old_subjects for prompt in asked)
