"""Sequences over shards: each token is a target once, no label crosses documents, borders of shards are not seen."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_folders import EOS, Document, text, write_folder, write_shards

from pkm_lightning.data import NO_TARGET, TokensDataModule
from pkm_lightning.data.packing import PieceOrder
from pkm_lightning.data.pieces import ConsecutivePieces, Pieces, write_pieces
from pkm_lightning.data.sequences import DocumentSequences, WindowSequences
from pkm_lightning.data.shards import mapped
from pkm_lightning.data.shards.mapped import TokenShards
from pkm_lightning.data.tokenizer import bytes_tokenizer
from pkm_lightning.errors import ConfigError

LOADER = {
    "val_path": None, "test_path": None, "packing": "windows", "seq_len": 8, "global_batch_size": 4, "num_workers": 0,
    "order_seed": 3, "prompts": [], "prompts_file": None,
}  # fmt: skip
HELD_OUT = [text("this is held out"), text("this as well")]

few = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
#: Documents of distinct tokens, by number of tokens without the end token.
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(sizes: Sequence[int], unlearned: bool = False, turns: int | None = None) -> list[Document]:
    """Returns documents whose tokens are their places in the part, modulo 256, so that each shows where it is from.

    With `turns` an end token stands at every such place, as behind the turns of a conversation.
    """
    documents, place = list[Document](), 0
    for size in sizes:
        # 0 and 1 are control tokens.
        tokens = [EOS if turns and i % turns == turns - 1 else 2 + (place + i) % 256 for i in range(size)]
        documents.append(([*tokens, EOS], size // 2 if unlearned else 0))
        place += size + 1
    return documents


def opened(root: Path, documents: Sequence[Document], *, shard_tokens: int = 17, **options: Any) -> TokensDataModule:
    folder = write_folder(root, {"train": documents, "validation": HELD_OUT}, shard_tokens=shard_tokens)
    data = TokensDataModule(**{**LOADER, "path": str(folder), "cache_dir": str(root / "cache"), **options})
    data.prepare_data()
    return data


def targets_of(source: Any, keys: Sequence[Any]) -> list[tuple[int, int]]:
    """Returns input and label of every target of some sequences, in their order."""
    batch = source.__getitems__(list(keys))
    is_target_BT = batch["labels"] != NO_TARGET
    inputs, labels = (batch[name][is_target_BT].tolist() for name in ("input_ids", "labels"))
    return list(zip(inputs, labels, strict=True))


def pairs_of(documents: Sequence[Document], limit: int | None = None) -> Counter[tuple[int, int]]:
    """Returns all pairs of neighbours within documents, of the first `limit` places, the later one learned."""
    places: list[tuple[int, int] | None] = []
    for tokens, unlearned in documents:
        places += [pair if i + 1 >= unlearned else None for i, pair in enumerate(pairwise(tokens))]
        places.append(None)
    return Counter(pair for pair in places[:limit] if pair is not None)


@few
@given(
    sizes=lengths,
    shard_tokens=st.integers(1, 60),
    seq_len=st.integers(2, 12),
    mask=st.booleans(),
    turns=st.sampled_from([None, 1, 3]),
)
def test_windows_show_every_pair_of_neighbours_once(
    sizes: list[int], shard_tokens: int, seq_len: int, mask: bool, turns: int | None
) -> None:
    documents = numbered(sizes, mask, turns)
    with TemporaryDirectory() as folder:
        write_shards(Path(folder), {"train": documents}, shard_tokens=shard_tokens)
        windows = WindowSequences(TokenShards(Path(folder), "train"), seq_len=seq_len, pad_id=0)
        assert len(windows) == (sum(len(tokens) for tokens, _ in documents) - 1) // seq_len
        shown = targets_of(windows, range(len(windows)))
        assert Counter(shown) == pairs_of(documents, len(windows) * seq_len)
        document_of = np.repeat(np.arange(len(documents)), [len(tokens) for tokens, _ in documents])
        if len(windows):
            docs_BT = windows.__getitems__(list(range(len(windows))))["doc_ids"].numpy()
            of_BT = document_of[: docs_BT.size].reshape(docs_BT.shape)
            assert (docs_BT == of_BT - of_BT[:, :1]).all()


@few
@given(
    sizes=lengths,
    shard_tokens=st.integers(1, 60),
    seq_len=st.integers(2, 12),
    packed=st.booleans(),
    block=st.integers(1, 8),
)
def test_every_token_of_every_document_is_a_target_once_per_epoch(
    sizes: list[int], shard_tokens: int, seq_len: int, packed: bool, block: int
) -> None:
    documents, capacity = numbered(sizes), seq_len if packed else None
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, {"train": documents}, shard_tokens=shard_tokens)
        shards = TokenShards(folder, "train")
        write_pieces(folder, {"train": shards}, seq_len, lambda *place: "")
        pieces = Pieces(folder, "train")
        source = DocumentSequences(shards, pieces, width=capacity, pad_id=0)
        order = PieceOrder(pieces.lengths, capacity=capacity, seed=0, block=block)
        sections = -(-len(pieces) // block)
        for epoch in (0, 1):
            keys = [key for i in range(sections) for key in order.keys(epoch * sections + i)]
            assert Counter(targets_of(source, keys)) == pairs_of(documents)
        assert Counter(targets_of(source, ConsecutivePieces.of(folder, "train", pieces, capacity))) == pairs_of(
            documents
        )
        batch = source.__getitems__(keys)
        assert batch["input_ids"].shape[1] == (seq_len if packed else -(-min(seq_len, max(sizes)) // 8) * 8)
        # Within a sequence a document is one run of tokens that follow each other.
        same_BT = batch["doc_ids"][:, 1:] == batch["doc_ids"][:, :-1]
        follows_BT = batch["input_ids"][:, 1:] == batch["labels"][:, :-1]
        assert (~same_BT | follows_BT | ~batch["valid"][:, 1:]).all()


def test_answers_alone_are_learned(tmp_path: Path) -> None:
    documents = [text("ask: yes", unlearned=4), text("who: me", unlearned=4)]
    for packing in ("documents", "none", "windows"):
        data = opened(tmp_path, documents, packing=packing, seq_len=16)
        labels = [label for _, label in targets_of(data.splits.train, data.splits.order.keys(0))]
        answers = [bytes_tokenizer().decode(ids) for ids in (labels[: labels.index(EOS)], labels[labels.index(EOS) :])]
        assert sorted(answers) == [" me", " yes"]


def test_a_prompt_is_not_cut_from_its_answer(tmp_path: Path) -> None:
    documents = [text("ask: yes", 4), text("ask: " + "a" * 20, 4), text("ask: " + "a" * 30, 4), text("t" * 90)]
    message = r"record 2 of file 1 needs 25 tokens, data\.seq_len=16 is too short, .*set data\.seq_len=35 or more"
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, documents, packing="documents", seq_len=16)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == [], "nothing half-written"
    opened(tmp_path, documents, packing="windows", seq_len=16)
    opened(tmp_path, documents, packing="documents", seq_len=35)


def test_blocks_show_each_piece_once_and_hold_one_block(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(1, 20, 1000).astype(np.int32)
    order = PieceOrder(sizes, capacity=32, seed=1, block=64)
    for epoch in (0, 1):
        sections = [order.keys(epoch * 16 + block) for block in range(16)]
        assert sorted(np.concatenate([np.concatenate(keys[:]) for keys in sections]).tolist()) == list(range(1000))
        assert max(sizes[key].sum() for keys in sections for key in keys) <= 32
        assert [order.size(epoch * 16 + block) for block in range(16)] == [len(keys) for keys in sections]
    # The shuffle is one of the whole part: a block holds pieces from everywhere.
    block = np.concatenate(order.keys(3)[:])
    assert block.min() < 200 < 800 < block.max()


def test_held_out_documents_are_packed_in_their_order_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = TokenShards(write_folder(tmp_path, {"train": numbered([3, 4, 9, 1, 1, 7, 2] * 30)}), "train")
    keys = list[list[list[int]]]()
    for block in (2**20, 16):
        monkeypatch.setattr("pkm_lightning.data.pieces.BLOCK", block)
        folder = tmp_path / str(block)
        folder.mkdir()
        write_pieces(folder, {"train": shards}, 8, lambda *place: "")
        pieces = Pieces(folder, "train")
        keys.append([key.tolist() for key in ConsecutivePieces.of(folder, "train", pieces, 8)])
    assert keys[0] == keys[1]
    assert [piece for key in keys[0] for piece in key] == list(range(len(pieces)))


def test_a_worker_opens_the_files_again(tmp_path: Path) -> None:
    for packing in ("windows", "documents"):
        train = opened(tmp_path, numbered([30] * 40), packing=packing).splits.train
        sent = pickle.dumps(train)
        assert len(sent) < 1500
        key = [0] if packing == "windows" else [np.asarray([1])]
        assert pickle.loads(sent).__getitems__(key)["input_ids"].equal(train.__getitems__(key)["input_ids"])


def test_thousands_of_shards_keep_no_file_open_and_few_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MAPPED_SHARDS", 3)
    write_shards(tmp_path, {"train": numbered([9] * 40, unlearned=True)}, shard_tokens=10)
    shards = TokenShards(tmp_path, "train")
    assert len(shards.shards) == 40
    before = len(list(Path("/proc/self/fd").iterdir()))
    everything = np.asarray([0]), np.asarray([shards.n_tokens])
    assert shards.spans(*everything).tolist() == [t for tokens, _ in numbered([9] * 40) for t in tokens]
    assert not shards.learned_spans(*everything).all()
    assert shards.begins_in(*everything).sum() == 40
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= 3 * 3


def test_pieces_of_one_part_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, numbered([30] * 40), packing="documents")
    forbidden: Callable[..., None] = lambda *_: pytest.fail("made again")  # noqa: E731
    monkeypatch.setattr("pkm_lightning.data.sharded.write_pieces", forbidden)
    data = opened(tmp_path, numbered([30] * 40), packing="none")
    assert isinstance(data.splits.train, DocumentSequences)
