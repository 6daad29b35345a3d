"""Mixtures: exact shares, epochs of each source, an order of position alone, and figures of the mixture held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_folders import text, write_folder

from pkm_lightning.data import MixDataModule
from pkm_lightning.data.mixture import MixedOrder, places_per_block
from pkm_lightning.data.order import ShuffledOrder, Timeline
from pkm_lightning.data.packing import PackedOrder
from pkm_lightning.data.tokenizer import bytes_tokenizer, train_bpe
from pkm_lightning.errors import ConfigError, DataError

OPTIONS = {
    "packing": "documents", "seq_len": 32, "global_batch_size": 4, "num_workers": 0, "order_seed": 3, "prompts": [],
    "prompts_file": None,
}  # fmt: skip

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(weights=weights, block=st.integers(1, 300))
def test_places_are_the_shares_rounded(weights: list[float], block: int) -> None:
    places = places_per_block(weights, block)
    assert sum(places) == block
    assert all(abs(n - weight / sum(weights) * block) < 1 for n, weight in zip(places, weights, strict=True))


def test_equal_weights_share_what_is_left_from_the_first_one_on() -> None:
    assert places_per_block([1, 1, 1], 11) == [4, 4, 3]
    assert places_per_block([0.7, 0.3], 1000) == [700, 300]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    places=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_shares_are_exact_and_sources_repeat_only_after_an_epoch(
    sizes: list[int], places: list[int], seed: int
) -> None:
    places = places[: len(sizes)]
    order = MixedOrder([ShuffledOrder(n, seed=i) for i, n in enumerate(sizes)], places, seed)
    block = sum(places)
    keys = Timeline(order).keys(0, 12 * block)
    for begin in range(0, len(keys), block):
        assert Counter(source for source, _ in keys[begin : begin + block]) == dict(enumerate(places))
    for source, n in enumerate(sizes):
        given_keys = [key for name, key in keys if name == source]
        # As the source alone would have given them.
        assert given_keys == Timeline(ShuffledOrder(n, seed=source)).keys(0, len(given_keys))


@settings(max_examples=20)
@given(position=st.integers(0, 400), count=st.integers(1, 90))
def test_keys_depend_on_seed_and_position_alone(position: int, count: int) -> None:
    def order(seed: int = 0) -> MixedOrder:
        packed = PackedOrder(LENGTHS, LENGTHS, capacity=10, seed=1)
        return MixedOrder([ShuffledOrder(13, seed=1), packed], [7, 4], seed)

    def shown(keys: list[Any]) -> list[Any]:
        return [(source, key if source == 0 else key.tolist()) for source, key in keys]

    whole = shown(Timeline(order()).keys(0, 500))
    timeline = Timeline(order())
    assert shown(timeline.keys(position, count)) == whole[position : position + count]
    assert shown(timeline.keys(0, 20)) == whole[:20]
    assert [source for source, _ in Timeline(order(1)).keys(0, 500)] != [source for source, _ in whole]
    blocks = [tuple(source for source, _ in whole[i : i + 11]) for i in range(0, 495, 11)]
    assert len(set(blocks)) > 5, "every block is shuffled anew"


LENGTHS = np.arange(40) % 7 + 1


def mixture(root: Path, sources: dict[str, Any], **options: Any) -> MixDataModule:
    return MixDataModule(**{**OPTIONS, "sources": sources, "cache_dir": str(root / "cache"), **options})


def folders(root: Path, **options: Any) -> dict[str, Any]:
    few = write_folder(
        root, {"train": [text("few")] * 6, "validation": [text("Few")] * 8}, questions=[("a", "1"), ("b", "2")]
    )
    parts = {"train": [text("many more")] * 50, "validation": [text("Many")] * 30}
    many = write_folder(root, parts, questions=[(prompt, "3") for prompt in "cde"])
    return {"few": {"path": str(few), "weight": 0.25}, "many": {"path": str(many), "weight": 0.75}}


@pytest.mark.parametrize("packing", ["none", "documents", "windows"])
def test_batches_hold_the_sources_in_their_shares(tmp_path: Path, packing: str) -> None:
    data = mixture(tmp_path, folders(tmp_path), packing=packing, seq_len=16)
    data.prepare_data()
    assert data.vocab_size == 258
    batches = iter(data.train_dataloader())
    rows = [row for _ in range(250) for row in zip(*next(batches).values(), strict=True)]
    if packing == "none":
        words = Counter(bytes_tokenizer().decode(ids[valid].tolist()) for ids, _, _, valid in rows)
        assert words == {"few": 250, "many more": 750}
    for _, labels, docs, valid in rows:
        assert (labels[~valid] == -100).all()
        assert ((docs >= 0) == valid).all()


def test_validation_has_the_shares_of_training(tmp_path: Path) -> None:
    data = mixture(tmp_path, folders(tmp_path), packing="none")
    data.prepare_data()
    texts = [
        bytes_tokenizer().decode(ids[valid].tolist())
        for batch in data.val_dataloader()
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True)
    ]
    # 8 of `few` need 24 of the 30 of `many`.
    assert Counter(texts) == {"Few": 8, "Many": 24}
    assert data.splits.test is None
    assert [item.prompt for item in data.recall_items()] == list("acbde")
    assert [item.prompt for item in data.recall_items(2)] == list("ac")


def test_a_mixture_resumes_at_a_position(tmp_path: Path) -> None:
    data = mixture(tmp_path, folders(tmp_path))
    data.prepare_data()
    state = {**data.state_dict(), "samples": 12}
    batches = iter(data.train_dataloader())
    later = [next(batches) for _ in range(5)][3]
    resumed = mixture(tmp_path, folders(tmp_path), num_workers=1)
    resumed.load_state_dict(state)
    resumed.prepare_data()
    assert next(iter(resumed.train_dataloader()))["input_ids"].equal(later["input_ids"])
    other = folders(tmp_path)
    other["few"]["weight"] = 0.5
    with pytest.raises(DataError, match=r"not those that the checkpoint was trained on"):
        mixture(tmp_path, other).load_state_dict(state)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, r"data\.sources=\{\} names no sources; set 'data\.sources=\{NAME: \{path: FOLDER, weight: 1\}\}'"),
        (
            {"a": {"weight": 1}},
            r"data\.sources\.a=.* must have the key path and may have weight \(1 if it is left out\)",
        ),
        ({"a": {"path": "x", "weight": 1, "size": 2}}, r"data\.sources\.a=.* must have the key path"),
        ({"a": {"path": "x", "weight": -1}}, r"data\.sources\.a\.weight=-1 is out of range"),
        ({"a": {"path": "x", "weight": 1e308}}, r"data\.sources\.a\.weight=1e\+308 is out of range"),
        ({"a": {"path": "x", "weight": 0}}, r"data\.sources\.a\.weight=0 gives it no sequence; set 1e-09 or more"),
        ({"a": {"path": "x", "weight": 1e-308}}, r"data\.sources\.a\.weight=1e-308 gives it no sequence"),
        ({"a": {"path": ["x"], "weight": 1}}, r"data\.sources\.a\.path=\['x'\] is no folder; give each folder a name"),
        ({"a": {"path": "", "weight": 1}}, r"data\.sources\.a\.path= names no files"),
        (
            {"a": {"path": "x", "weight": 1}, "b": {"path": "y", "weight": 0.0001}},
            r"data\.sources\.b\.weight=0\.0001 gives it no sequence in 1000; its share must be 0\.001 or more",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(tmp_path: Path, sources: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture(tmp_path, sources)


def test_a_source_is_refused_by_its_name(tmp_path: Path) -> None:
    sources = folders(tmp_path)
    with pytest.raises(DataError, match=r"data\.sources\.new\.path=/no/such does not exist"):
        mixture(tmp_path, {**sources, "new": {"path": "/no/such", "weight": 1}}).prepare_data()
    other = write_folder(tmp_path, {"train": [text("a")]}, tokenizer=train_bpe(["ab ab"], 259))
    with pytest.raises(
        DataError, match=r"data\.sources\.new\.path=.* another tokenizer than data\.sources\.few\.path="
    ):
        mixture(tmp_path, {**sources, "new": {"path": str(other), "weight": 1}}).prepare_data()


def test_a_source_without_validation_part_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"train": [text("a")]})
    with pytest.raises(
        DataError, match=r"data\.sources\.new\.path=.* has no validation part; prepare it again with data\.val_fraction"
    ):
        mixture(tmp_path, {**folders(tmp_path), "new": {"path": str(folder), "weight": 1}}).prepare_data()


def test_the_chat_template_is_that_of_the_first_source_that_has_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = folders(tmp_path)
    for name, template in (("few", None), ("many", "{{ messages }}"), ("other", "{{ other }}")):
        tokenizer = bytes_tokenizer()
        tokenizer.chat_template = template
        parts = {"train": [text(name)] * 9, "validation": [text(name)] * 9}
        folder = write_folder(tmp_path, parts, tokenizer=tokenizer, name=name)
        sources[name] = {"path": str(folder), "weight": 1}
    data = mixture(tmp_path, sources)
    data.prepare_data()
    assert data.tokenizer.chat_template == "{{ messages }}"
    assert "data.sources.other.path has another chat template than data.sources.many.path" in caplog.text
