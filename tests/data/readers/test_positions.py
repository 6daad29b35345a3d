"""Readers report how far they are in a file as it lies on disk, by which progress and the time left are computed."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from pkm_lightning.data.readers.fields import Fields
from pkm_lightning.data.readers.file_reader import FileReader
from pkm_lightning.data.readers.hf import DatasetReader
from pkm_lightning.data.readers.jsonl import JsonlReader
from pkm_lightning.data.readers.text import TextReader
from pkm_lightning.data.template_renderer import TemplateRenderer

TEXTS = [f"{(i * 7919) ** 5:x} " * 150 for i in range(1_000)]
FIELDS = Fields(text="text", prompt="prompt", answer="answer", messages="messages")
RENDERER = TemplateRenderer("", {}, "none")


def write_arrow(path: Path, kind: str) -> None:
    table = pyarrow.table({"text": TEXTS})
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=300)
        return
    new = pyarrow.ipc.new_file if kind == ".arrow" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "stream.arrow"]
)
def test_positions_rise_to_the_size_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix in (".parquet", ".arrow"):
        write_arrow(path, "stream" if name == "stream.arrow" else path.suffix)
    else:
        lines = [json.dumps({"text": text}) if "json" in name else text for text in TEXTS]
        content = "\n".join(["text", *lines] if ".csv" in name else lines).encode()
        pack: Any = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content))
    records: dict[str, Any] = {"fields": FIELDS, "renderer": RENDERER}
    reader: FileReader = (
        TextReader(str(path), endings=[".txt"], document_separator=None)
        if ".txt" in name
        else JsonlReader(str(path), endings=[".jsonl"], **records)
        if ".jsonl" in name
        else DatasetReader(str(path), split="train", limit=None, **records)
    )
    positions = [reader.consumed for _ in reader.pieces()]
    size = path.stat().st_size
    assert all(0 <= one <= other for one, other in pairwise(positions))
    assert 0.9 * size < positions[-1] <= size
    middle = [position for position in positions if 0.1 * size < position < 0.9 * size]
    assert middle or len(positions) < 4
