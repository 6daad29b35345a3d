"""The files of a shard hold what was written, whatever is a target of learning."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkm_lightning.data.shards import format as shard_format
from pkm_lightning.data.shards.format import INDEX, ShardWriter
from pkm_lightning.data.shards.mapped import TokenShards

# A document has its end token at least.
RUNS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=12)


@settings(max_examples=40, deadline=None)
@given(runs=RUNS, vocab_size=st.sampled_from([300, 70_000]))
def test_what_is_written_is_read(
    runs: list[tuple[int, bool]], vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, "train-00000", vocab_size)
    ids = [rng.integers(0, vocab_size, n) for n, _ in runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_format, "BLOCK", 16)  # runs that span blocks, and blocks with several runs
        for record, (some, (_, learned)) in enumerate(zip(ids, runs, strict=True)):
            if len(some):  # a document has its end token at least
                writer.begin_document(2, record)
            writer.write(some, learned=learned)
        info = writer.close()
    n = sum(map(len, ids))
    expected = np.concatenate([np.full(n, learned) for n, learned in runs]) if runs else np.empty(0, dtype=bool)
    documents = [record for record, some in enumerate(ids) if len(some)]
    assert (info.tokens, info.documents, info.targets) == (n, len(documents), expected.sum())
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in writer.sha256} == writer.sha256
    assert set(writer.sha256) == {path.name for path in folder.iterdir()}
    index = {"vocab_size": vocab_size, "parts": {"train": [vars(info)]}}
    (folder / INDEX).write_text(json.dumps(index))
    if n:
        shards = TokenShards(folder, "train")
        whole = np.asarray([0]), np.asarray([n])
        assert np.array_equal(shards.spans(*whole), np.concatenate(ids))
        assert np.array_equal(shards.learned_spans(*whole), expected)
        assert shards.begins(0).tolist() == np.cumsum([0, *(len(ids[record]) for record in documents)])[:-1].tolist()
        assert shards.places(0).tolist() == [[2, record] for record in documents]
