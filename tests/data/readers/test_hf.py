"""Datasets on disk and on the hub: rows in order, files of one format and split, errors with file and row."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkm_lightning.data.conversations import DEFAULT_TEMPLATE
from pkm_lightning.data.documents import Piece, Segment
from pkm_lightning.data.readers import hf, tables
from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.hf import DatasetReader, HubReader, dataset_reader
from pkm_lightning.data.template_renderer import TemplateRenderer
from pkm_lightning.errors import ConfigError, DataError

FIELDS = Fields(text="text", prompt="prompt", answer="answer", messages="messages")
TEXTS = [f'row {i}, \u6f22 "quoted"\u2028and\nmore' for i in range(300)]


def reader(path: str | Path | list[str], **changes: Any) -> DatasetReader:
    options: dict[str, Any] = {"split": "train", "limit": None, "name": None, "streaming": True, "key": "data.path"}
    renderer = TemplateRenderer(DEFAULT_TEMPLATE, {"bos_token": "", "eos_token": "<eos>"}, "the default")
    given_path = str(path) if isinstance(path, Path) else path
    return dataset_reader(given_path, renderer=renderer, **{"fields": FIELDS, **options, **changes})


def texts_of(made: DatasetReader, first_file: int = 0) -> list[str]:
    return [segment.text for piece in made.pieces(first_file) for segment in piece.segments]


def write_parquet(file: Path, texts: list[Any], **options: Any) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), file, **options)


def write_arrow(file: Path, texts: list[Any], *, stream: bool = True) -> None:
    table = pa.table({"id": range(len(texts)), "text": texts})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=200)


def write_csv(file: Path, texts: list[Any]) -> None:
    with gzip.open(file, "wt") if file.suffix == ".gz" else file.open("w") as out:
        writer = csv.writer(out)
        writer.writerows([("id", "text"), *enumerate(texts)])


def write_list(file: Path, texts: list[Any]) -> None:
    file.write_text(json.dumps([{"text": text, "id": i} for i, text in enumerate(texts)]))


def write_lines(file: Path, texts: list[Any]) -> None:
    file.write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)))


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "a.parquet": lambda file, texts: write_parquet(file, texts, row_group_size=70),
    "dictionary.parquet": lambda file, texts: write_parquet(file, pa.array(texts).dictionary_encode()),
    "large.parquet": lambda file, texts: write_parquet(file, pa.array(texts, pa.large_string())),
    "stream.arrow": write_arrow,
    "file.arrow": lambda file, texts: write_arrow(file, texts, stream=False),
    "a.csv": write_csv,
    "a.csv.gz": write_csv,
    "list.json": write_list,
    "lines.json": write_lines,
    "a.jsonl": write_lines,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_format_are_read_in_order(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    made = reader(tmp_path)
    pieces = list(made.pieces())
    assert pieces == [Piece(0, i, (Segment(text),)) for i, text in enumerate(TEXTS)]
    assert made.where(0, 7) == f"{tmp_path / name}, row 7"
    assert made.files == [tmp_path / name]
    assert texts_of(reader(tmp_path / name, limit=5)) == TEXTS[:5]


def test_conversations_and_questions_come_from_columns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Yes."}]
    pq.write_table(pa.table({"messages": [turns] * 3, "source": ["a"] * 3}), tmp_path / "a.parquet")
    assert [[s.text for s in p.segments] for p in reader(tmp_path).pieces()] == [
        ["user: Rome?\nassistant:", " Yes."]
    ] * 3
    pq.write_table(pa.table({"prompt": ["p"], "answer": ["a "]}), tmp_path / "a.parquet")
    assert [p.segments for p in reader(tmp_path).pieces()] == [(Segment("p", learned=False), Segment(" a"))]


def test_folders_are_of_one_format_and_one_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", [name])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("#")
    made = reader(tmp_path)
    assert texts_of(made) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert texts_of(made, 1) == ["train-00001-of-00002"]
    assert texts_of(reader(tmp_path, limit=2), 1) == ["train-00001-of-00002"], "the limit counts earlier files"
    assert made.skipped == {
        "files of other endings: .json": 1,
        "files of other endings: .md": 1,
        "files of other splits: test": 1,
    }
    assert texts_of(reader(tmp_path, split="test")) == ["test-00000-of-00001"]
    assert len(texts_of(reader(f"{tmp_path}/data/*.parquet"))) == 3, "files that are named are read"
    with pytest.raises(ConfigError, match=r"data\.split=dev: the files of .* are of the splits test, train; set one"):
        texts_of(reader(tmp_path, split="dev"))


def test_saved_datasets_are_read_without_files_that_were_cached_beside_them(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    both = datasets.DatasetDict({"train": whole.select(range(200)), "test": whole.select(range(200, 300))})
    both.save_to_disk(str(tmp_path / "both"), num_shards={"train": 2, "test": 1})
    write_arrow(tmp_path / "both" / "train" / "cache-1234.arrow", ["cached"])
    assert texts_of(reader(tmp_path / "both")) == TEXTS[:200]
    assert texts_of(reader(tmp_path / "both", split="test")) == TEXTS[200:]
    assert texts_of(reader(tmp_path / "both" / "test")) == TEXTS[200:]
    with pytest.raises(ConfigError, match=r"data\.split=tset: .* holds the splits train, test; .* Did you mean 'test'"):
        texts_of(reader(tmp_path / "both", split="tset"))
    (tmp_path / "both" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00000-of-00001\.arrow, which is missing"):
        texts_of(reader(tmp_path / "both" / "test"))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "a.jsonl"])
def test_nulls_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ["one", None, "three", None])
    made = reader(tmp_path / name, fields=dataclasses.replace(FIELDS, skip_nulls=True))
    pieces = list(made.pieces())
    assert [(piece.record, piece.segments[0].text) for piece in pieces] == [(0, "one"), (2, "three")]
    assert made.skipped == {"records with null": 2}


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "null": (
        "a.parquet",
        lambda f: write_parquet(f, ["a", None]),
        r"row 1: field 'text' is null \(fields present: id, text\).*skip_nulls",
    ),
    "blank": ("a.arrow", lambda f: write_arrow(f, ["a", " "]), r"row 1: field 'text' is blank"),
    "numbers": ("a.parquet", lambda f: write_parquet(f, [1, 2]), r"row 0: field 'text' is not text"),
    "a list": (
        "a.parquet",
        lambda f: write_parquet(f, [["a"]]),
        r"'text' is not text but a list, and nothing nested is",
    ),
    "a struct": (
        "a.parquet",
        lambda f: write_parquet(f, [{"a": "b"}]),
        r"'text' is not text but a struct, and nothing",
    ),
    "no rows": ("a.parquet", lambda f: write_parquet(f, []), r"data\.path=.* is empty; give files with rows"),
    "no column": (
        "a.parquet",
        lambda f: pq.write_table(pa.table({"body": ["a"], "n": [1]}), f),
        r"a\.parquet has no column 'text' \(columns present: body, n\); set data\.text_field",
    ),
    "garbage": ("a.parquet", lambda f: f.write_bytes(b"PAR1" + b"x" * 99), r"a\.parquet cannot be read from row 0 on"),
    "empty": (
        "a.parquet",
        lambda f: f.write_bytes(b""),
        r"a\.parquet cannot be read from row 0 on .*is damaged or inc",
    ),
    "garbage in Arrow": (
        "a.arrow",
        lambda f: f.write_bytes(b"ARROW1" + b"x" * 99),
        r"a\.arrow cannot be read from row",
    ),
    "no CSV": ("a.csv", lambda f: f.write_text('text\n"a" b\n'), r"a\.csv is not CSV after row -1"),
    "an open quote": (
        "a.csv",
        lambda f: f.write_text('text\nb\n"a\n'),
        r"a\.csv is not CSV after row 0 \(unexpected end",
    ),
    "a long row": (
        "a.csv",
        lambda f: f.write_text("text,id\na,1\nb\n"),
        r"a\.csv, row 1 has 1 fields, and the header 2",
    ),
    "a list in a list": ("a.json", lambda f: f.write_text('[{"text": "a"}, [1]]'), r"row 1 is a JSON list; each must"),
    "an open list": ("a.json", lambda f: f.write_text('[{"text": "a"},\n'), r"a\.json:2 is not JSON"),
    "an unknown kind": ("a.xlsx", lambda f: f.write_bytes(b"PK"), r"a\.xlsx has the ending '\.xlsx'; data=hf reads"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named_with_file_and_row(tmp_path: Path, name: str) -> None:
    file, write, message = BAD[name]
    write(tmp_path / file)
    with pytest.raises(DataError, match=message) as refusal:
        texts_of(reader(tmp_path / file))
    assert file in str(refusal.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.parquet", "stream.arrow", "file.arrow"]), place=st.floats(0, 1), flip=st.booleans())
def test_damaged_tables_end_in_an_error_that_names_them(tmp_path: Path, name: str, place: float, flip: bool) -> None:
    file = tmp_path / name
    WRITERS[name](file, TEXTS)
    content = bytearray(file.read_bytes())
    middle = int(place * (len(content) - 1))
    if flip:
        content[middle] ^= 0x55
    file.write_bytes(content if flip else content[:middle])
    read, refusal = None, ""
    try:
        read = texts_of(reader(file))
    except DataError as error:
        refusal = str(error)
    # A flipped letter of a text cannot be noticed, nor the end of a stream that is cut between batches.
    assert name in refusal if read is None else flip or read == TEXTS[: len(read)]


def test_a_long_list_and_a_long_field_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LIST_CHARACTERS", 1_000)
    monkeypatch.setattr(tables, "MAX_LINE_CHARACTERS", 1_000)
    write_list(tmp_path / "a.json", ["a" * 1_000])
    with pytest.raises(DataError, match=r"is one list of more than 1,000 characters; .* jq -c '\.\[\]' a\.json"):
        texts_of(reader(tmp_path / "a.json"))
    write_csv(tmp_path / "a.csv", ["a", "a" * 1_001])
    with pytest.raises(DataError, match=r"a\.csv is not CSV after row 0 \(field larger than field limit"):
        texts_of(reader(tmp_path / "a.csv"))
    assert csv.field_size_limit() > 1_000


def test_a_name_on_the_hub_is_refused_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    begin = time.perf_counter()
    with pytest.raises(
        DataError, match=r"data\.path=org/name is no file or folder, and .* \(Name or service not known"
    ):
        _ = reader("org/name").files
    assert time.perf_counter() - begin < 5
    with pytest.raises(DataError, match=r"data\.path=org/name\.parquet does not exist"):
        _ = reader("org/name.parquet").files


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_on_the_hub(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    class Info:
        sha = "5ad0"

    hf._hub_dataset.cache_clear()
    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, *options.values()))
        dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": range(300)})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    made = reader("org/name", name="en", streaming=streaming)
    assert isinstance(made, HubReader)
    assert texts_of(made) == TEXTS
    assert texts_of(reader("org/name", name="en", streaming=streaming)) == TEXTS
    assert asked == [("org/name", "en", "train", streaming, "5ad0")], "asked once for all readers"
    assert list(map(str, made.files)) == ["org/name-en-train@5ad0"], "the revision tells one state from another"
    assert made.where(0, 3) == "org/name, row 3"
