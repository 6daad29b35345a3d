"""Biographies: facts, exposures and wordings per person, and the entropy of names and values."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import EXACT_FLOAT

from pkm_lightning.data import BiographiesDataModule
from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.data.biographies.people import PeopleChoice, draw_people
from pkm_lightning.data.biographies.wording import ATTRIBUTES
from pkm_lightning.errors import ConfigError

SMALL = {
    "people": 20,
    "words": 8,
    "attributes": 3,
    "value_words": 2,
    "exposures": 3,
    "loss": "all",
    "seed": 0,
    "draw": 0,
    "eval_people": 8,
    "seq_len": 13,
    "global_batch_size": 6,
    "num_workers": 0,
    "order_seed": 1,
    "prompts": [],
    "prompts_file": None,
}
PHRASES = {phrase: kind for kind, phrases in ATTRIBUTES.items() for phrase in phrases}


@pytest.fixture
def data(tmp_path: Path) -> BiographiesDataModule:
    return opened(tmp_path)


def opened(cache: Path, **keys: Any) -> BiographiesDataModule:
    module = BiographiesDataModule(**{**SMALL, "cache_dir": str(cache), **keys})
    module.prepare_data()
    return module


def parsed(text: str) -> tuple[str, dict[str, str], list[str]]:
    """Returns name, values by attribute, and phrases of a biography, by capitals alone."""
    parts: list[list[str]] = [[]]
    for word in text.split():
        if not parts[-1] or parts[-1][-1][0].isupper() == word[0].isupper():
            parts[-1].append(word)
        else:
            parts.append([word])
    name, *rest = (" ".join(part) for part in parts)
    phrases, values = rest[::2], rest[1::2]
    return name, {PHRASES[phrase]: value for phrase, value in zip(phrases, values, strict=True)}, phrases


def test_every_exposure_states_the_same_of_each_person_in_another_way(data: BiographiesDataModule) -> None:
    batches = data.train_dataloader()
    texts: list[tuple[str, dict[str, str], list[str]]] = []
    for _, batch in zip(range(data.steps), batches, strict=False):
        assert (batch["input_ids"][:, 0] == data.tokenizer.eos_id).all()
        assert (batch["input_ids"][:, 1:] == batch["labels"][:, :-1]).all()
        texts += [parsed(data.tokenizer.decode(row.tolist())) for row in batch["labels"]]
    assert len(texts) == data.steps * 6 == 60
    lives: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for exposure in range(3):
        of_exposure = texts[20 * exposure : 20 * (exposure + 1)]
        assert len({name for name, *_ in of_exposure}) == 20  # all of them before anyone again
        for name, values, _ in of_exposure:
            lives[name].append(values)
    assert all(life == [life[0]] * 3 and len(life[0]) == 3 for life in lives.values())
    assert {len(name.split()) for name in lives} == {3}
    orders = Counter(tuple(PHRASES[phrase] for phrase in phrases) for *_, phrases in texts)
    assert len(orders) == 6  # each order of three sentences
    assert {phrase for *_, phrases in texts for phrase in phrases} == {
        p for k in list(ATTRIBUTES)[:3] for p in ATTRIBUTES[k]
    }
    # The text is what the tokenizer makes of it, so that a prompt is what training has shown.
    assert data.tokenizer.encode(data.tokenizer.decode(batch["labels"][0].tolist())) == batch["labels"][0, :-1].tolist()


def test_held_out_targets_are_names_and_values_of_other_people(data: BiographiesDataModule) -> None:
    names = {}
    for part in ("val", "test"):
        rows = list(getattr(data, f"{part}_dataloader")())
        inputs, labels = (np.concatenate([row[key].numpy() for row in rows]) for key in ("input_ids", "labels"))
        names[part] = {tuple(row) for row in inputs[:, 1:4].tolist()}
        words = data.tokenizer.encode_batch([data.tokenizer.decode([i]) for i in range(data.vocab_size)])
        is_word = np.array([bool(ids) and data.tokenizer.decode(ids)[0].isupper() for ids in words])
        following = np.concatenate([inputs[:, 1:], np.full((len(inputs), 1), data.tokenizer.eos_id)], axis=1)
        assert (labels == np.where(is_word[following], following, NO_TARGET)).all()
    assert (len(names["val"]), len(names["test"])) == (2, 8)
    assert not names["val"] & names["test"]


def test_the_loss_on_facts_leaves_out_the_phrases_alone(tmp_path: Path) -> None:
    every, facts = (next(iter(opened(tmp_path, loss=loss).train_dataloader())) for loss in ("all", "facts"))
    assert (every["input_ids"] == facts["input_ids"]).all()
    left_out = facts["labels"] != every["labels"]
    assert left_out.sum(1).tolist() == [3] * 6
    assert left_out[0].nonzero().flatten().tolist() == [3, 6, 9]


def test_names_are_distinct_and_values_uniform() -> None:
    """All names of three words of four: a draw that repeated one could not have all."""
    names_N3, values_NKV = draw_people(PeopleChoice(64, 4, 6, 2, seed=5, draw=0))
    assert {tuple(row) for row in names_N3.tolist()} == {
        (a, b, c) for a in range(4) for b in range(4) for c in range(4)
    }
    *_, values_NKV = draw_people(PeopleChoice(4000, 16, 6, 2, seed=5, draw=0))
    pairs = Counter(map(tuple, values_NKV.reshape(-1, 2).tolist()))
    # Chi-squared with 255 degrees of freedom: 5 standard deviations of about 22.6.
    expected = 4000 * 6 / 256
    assert sum((pairs[a, b] - expected) ** 2 / expected for a in range(16) for b in range(16)) < 255 + 5 * 22.6
    first, second = (draw_people(PeopleChoice(20, 4, 1, 1, seed=5, draw=draw))[0] for draw in (0, 1))
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()}


def test_the_entropy_is_that_of_the_sets(data: BiographiesDataModule) -> None:
    space = data.fact_space
    # 8 words: 512 names, of which 20 are taken, and 64 values.
    assert space.bits == pytest.approx(20 * (math.log2(512 / 20) + 3 * math.log2(64)), rel=EXACT_FLOAT)
    assert (space.name_bits, space.value_bits, data.n_facts) == (9, 6, 80)
    # With every name taken the names hold nothing: what is left are the values.
    assert PeopleChoice(512, 8, 3, 2, seed=0, draw=0).space.bits == 512 * 18


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seq_len": 16}, r"data.seq_len=16 is not the length of a biography of 3 attributes .* data.seq_len=13"),
        ({"people": 300, "draw": 1}, r"data.people=300 in data.draw=1 exceeds the names of data.words=8.*data.words=9"),
        ({"attributes": 9}, r"data.attributes=9"),
        ({"loss": "answer"}, r"data.loss='answer' is not known; allowed: all, facts"),
    ],
)
def test_refusals(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **keys)
