"""Records: loss on the answer or on the text, a split that appending does not change, errors with file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import sentencepiece_model

from pkm_lightning.data import NO_TARGET, JsonlDataModule
from pkm_lightning.data.base import answer_ids
from pkm_lightning.data.chat_template import ChatTemplate
from pkm_lightning.data.shards.mapped import read_index
from pkm_lightning.errors import ConfigError, DataError


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def documents(datamodule: JsonlDataModule) -> list[tuple[str, str]]:
    """Returns text and target text of every document of the first epoch."""
    decode = datamodule.tokenizer.decode
    pairs = []
    for key in datamodule.splits.order.keys(0)[:]:
        batch = datamodule.splits.train.__getitems__([key])
        ids, labels, docs = (batch[name][0] for name in ("input_ids", "labels", "doc_ids"))
        for doc in range(int(docs.max()) + 1):
            targets = labels[(docs == doc) & (labels != NO_TARGET)].tolist()
            pairs.append((decode(ids[docs == doc].tolist()), decode(targets)))
    return pairs


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_prompt_and_answer(jsonl: Callable[..., JsonlDataModule], tmp_path: Path, packing: str) -> None:
    path = write(tmp_path / "qa.jsonl", [{"q": f"Double {i}?", "a": str(2 * i), "z": None} for i in range(40)])
    datamodule = jsonl(path, packing=packing, prompt_field="q", answer_field="a")
    datamodule.prepare_data()
    items = datamodule.recall_items()
    trained = documents(datamodule)
    assert all(text.endswith(target) and target.startswith(" ") for text, target in trained)
    assert {text for text, _ in trained} | {f"{i.prompt} {i.answer}" for i in items} == {
        f"Double {i}? {2 * i}" for i in range(40)
    }
    assert len(trained) + len(items) == 40
    assert {(i.form, i.options, math.isnan(i.prior_bits)) for i in items} == {("validation", (), True)}
    assert [item.prompt for item in datamodule.recall_items(limit=1)] == [items[0].prompt]
    n_validation = sum(int(b["doc_ids"].max(dim=1).values.add(1).sum()) for b in datamodule.val_dataloader())
    assert n_validation == len(items)


def test_texts_longer_than_a_sequence_are_continued(jsonl: Callable[..., JsonlDataModule], tmp_path: Path) -> None:
    texts = ["abcdefghij" * 5 + str(i) for i in range(10)]
    datamodule = jsonl(write(tmp_path / "t.jsonl", [{"text": t} for t in texts]), seq_len=16, packing="none")
    datamodule.prepare_data()
    pieces = documents(datamodule)
    assert all(target == text[1:] or target[:-1] == text[1:] for text, target in pieces)
    assert max(len(text) for text, _ in pieces) == 16
    assert sum(len(text) for text, _ in pieces) in {51 * n for n in range(5, 10)}
    assert datamodule.recall_items() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty; write one JSON object per line"),
        ('{"text": "a"}\n{"text": }', r"r\.jsonl:2 is not JSON"),
        ('{"text": "a"}\n\n[1]', r"r\.jsonl:3 is a JSON list"),
        ('{"text": "a"}\n{"body": "b", "n": 1}', r"r\.jsonl:2: field 'text' is missing \(fields present: body, n\)"),
        (
            '{"conversations": []}',
            r"field 'text' is missing .*; correct .* data\.answer_field, or data\.messages_field\.",
        ),
        ('{"text": "a"}\n{"text": " "}', r"r\.jsonl:2: field 'text' is blank"),
        ('{"text": "a"}\n{"text": 3}', r"r\.jsonl:2: field 'text' is not text"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', r"r\.jsonl:2: field 'answer' is missing"),
        ('{"prompt": "a", "answer": "b"}', r"has 1 document; training and validation need one each"),
    ],
)
def test_bad_records_are_refused(
    jsonl: Callable[..., JsonlDataModule], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        jsonl(str(tmp_path)).prepare_data()


def test_a_long_record_names_its_line_and_the_length(jsonl: Callable[..., JsonlDataModule], tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a" * 30, "answer": "b"}])
    with pytest.raises(ConfigError, match=r"qa\.jsonl:2 needs 32 tokens, data\.seq_len=16 .* set data\.seq_len=32"):
        jsonl(path, seq_len=16).prepare_data()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_one_space_stands_before_an_answer_with_tokenizers_that_add_one(
    jsonl: Callable[..., JsonlDataModule], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "t.model").write_bytes(sentencepiece_model(kind))
    path = write(tmp_path / "qa.jsonl", [{"prompt": f"Double {i}?", "answer": str(2 * i)} for i in range(20)])
    datamodule = jsonl(path, packing="none", tokenizer=str(tmp_path / "t.model"))
    datamodule.prepare_data()
    tokenizer = datamodule.tokenizer
    whole = {tuple(tokenizer.encode(f"Double {i}? {2 * i}")) for i in range(20)}
    batches = [datamodule.splits.train.__getitems__([key]) for key in datamodule.splits.order.keys(0)[:]]
    assert {tuple(batch["input_ids"][0][batch["doc_ids"][0] >= 0].tolist()) for batch in batches} <= whole
    for item in datamodule.recall_items():
        ids = tokenizer.encode(item.prompt) + answer_ids(tokenizer, item.answer)
        assert tuple(ids) in whole
        assert tokenizer.decode(ids[len(tokenizer.encode(item.prompt)) :]) == item.answer


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"Double {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]}
    for i in range(40)
]


@pytest.mark.parametrize(
    ("tokenizer", "changes", "end"),
    [
        ("bytes", {}, ""),
        ("bpe", {"special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": "chatml"}, "<|im_end|>"),
    ],
)
def test_answers_of_conversations_are_learned_and_the_template_is_kept(
    jsonl: Callable[..., JsonlDataModule],
    tmp_path: Path,
    tokenizer: str,
    changes: dict[str, Any],
    end: str,
) -> None:
    path = write(tmp_path / "chat.jsonl", CONVERSATIONS)
    datamodule = jsonl(path, tokenizer=tokenizer, packing="none", val_fraction=0.1, **changes)
    datamodule.prepare_data()
    trained = documents(datamodule)
    assert {target for _, target in trained} <= {f"{'' if end else ' '}It is {2 * i}." for i in range(40)}
    assert len(trained) > 30
    template = datamodule.tokenizer.chat_template
    assert template is not None
    # What `chat` of a run writes before an answer is what training has shown before it.
    chat = ChatTemplate(template, datamodule.tokenizer, tmp_path)
    asked = chat.encode([{"role": "user", "content": "Double 7?"}])
    batches = [datamodule.splits.train.__getitems__([key]) for key in datamodule.splits.order.keys(0)[:]]
    shown = [batch["input_ids"][0, : len(asked)].tolist() for batch in batches]
    shown += [b["input_ids"][0, : len(asked)].tolist() for b in datamodule.val_dataloader()]
    assert asked in shown
    ends = [datamodule.tokenizer.encode_rendered(end)[0]] if end else [datamodule.tokenizer.eos_id]
    assert chat.end_ids() == ends
    assert all(set(ends) <= set(batch["labels"].flatten().tolist()) for batch in batches), "ends are learned"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "chatlm"}, r"data\.chat_template='chatlm' is not known; .* Did you mean 'chatml'\?"),
        ({"chat_template": "none.jinja"}, r"data\.chat_template=none\.jinja does not exist; give chatml, or the path"),
        (
            {"chat_template": "chatml"},
            r"chatml: data\.tokenizer=bytes has no control token <\|im_start\|> or <",
        ),
        ({"test_fraction": 0.7}, r"data\.test_fraction=0\.7 is out of range"),
        ({"test_fraction": 0.1, "test_path": "x"}, r"data\.test_fraction=0\.1 and data\.test_path=x: set one of them"),
        ({"val_path": ""}, r"data\.val_path= names no files"),
        (
            {"packing": "windows"},
            r"data\.packing=windows would cut the conversations of data\.path=.*; set data\.packing=",
        ),
        ({"packing": "tight"}, r"data\.packing='tight' is not known; allowed: windows, documents, none"),
    ],
)
def test_bad_keys_are_refused(
    jsonl: Callable[..., JsonlDataModule], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        jsonl(write(tmp_path / "chat.jsonl", CONVERSATIONS), **changes).prepare_data()


def test_skipped_nulls_are_in_what_was_read_and_other_data_than_all(
    jsonl: Callable[..., JsonlDataModule], tmp_path: Path
) -> None:
    records = [{"prompt": f"{i}?", "answer": None if i % 5 == 4 else f"{i}!"} for i in range(20)]
    path = write(tmp_path / "r.jsonl", records)
    with pytest.raises(DataError, match=r"r\.jsonl:5: field 'answer' is null .* or data\.skip_nulls=true"):
        jsonl(path).prepare_data()
    data = jsonl(path, skip_nulls=True)
    data.prepare_data()
    index = read_index(data.cache_folder())
    assert index["skipped"] == {"records with null": 4}
    assert index["read"]["documents"] == 16
    with pytest.raises(ConfigError, match=r"data\.skip_nulls='maybe' is neither true nor false"):
        jsonl(path, skip_nulls="maybe")
