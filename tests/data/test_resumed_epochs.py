"""Runs that are stopped at any position and go on with other ranks, workers and micro-batches see the same epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_folders import text, write_folder

from pkm_lightning.data import MixDataModule, TokensDataModule
from pkm_lightning.data.datamodule import TokenDataModule

GLOBAL = 4
LOADER = {
    "seq_len": 8, "global_batch_size": GLOBAL, "order_seed": 3, "prompts": [], "prompts_file": None,
}  # fmt: skip
#: Batches of one sitting: ranks, micro-batches per step, steps until it is killed, workers.
Sitting = tuple[int, int, int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [text(f"{i}: {'word ' * (i % 7)}end") for i in range(60)]
    return write_folder(tmp_path_factory.mktemp("data"), {"train": documents, "validation": documents[:5]})


def make(folder: Path, packing: str, workers: int = 0) -> TokenDataModule:
    options: dict[str, Any] = {**LOADER, "num_workers": workers, "cache_dir": str(folder.parent)}
    if packing == "mix":
        sources = {name: {"path": str(folder), "weight": weight} for name, weight in (("one", 0.7), ("two", 0.3))}
        return MixDataModule(sources=sources, packing="documents", **options)
    return TokensDataModule(path=str(folder), val_path=None, test_path=None, packing=packing, **options)


class OneRank:
    """What a data module reads of the Trainer of one rank, in a sitting that began with no steps behind it."""

    def __init__(self, rank: int, ranks: int, accumulate: int) -> None:
        self.distributed_sampler_kwargs = {"rank": rank, "num_replicas": ranks}
        self.accumulate_grad_batches = accumulate
        self.ready = 0

    @property
    def fit_loop(self) -> Any:
        total = SimpleNamespace(ready=self.ready)
        return SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))


def sit(folder: Path, packing: str, sitting: Sitting, state: dict[str, Any] | None) -> tuple[list[Any], dict[str, Any]]:
    """Trains until the kill: returns the sequences of each optimizer step in order, and the state of rank 0."""
    ranks, accumulate, steps, workers = sitting
    modules, loaders = list[TokenDataModule](), list[Iterator[Any]]()
    for rank in range(ranks):
        data = make(folder, packing, workers)
        data.trainer = OneRank(rank, ranks, accumulate)  # type: ignore[assignment]
        if state is not None:
            data.load_state_dict(state)
        data.prepare_data()
        modules.append(data)
        loaders.append(iter(data.train_dataloader()))
    seen = []
    for _ in range(steps):
        for _ in range(accumulate):
            for data, loader in zip(modules, loaders, strict=True):
                batch = next(loader)
                seen += [
                    tuple(zip(ids[valid].tolist(), labels[valid].tolist(), strict=True))
                    for ids, labels, valid in zip(batch["input_ids"], batch["labels"], batch["valid"], strict=True)
                ]
                data.trainer.ready += 1  # type: ignore[union-attr]
    return seen, modules[0].state_dict()


def undisturbed(folder: Path, packing: str, sequences: int) -> list[Any]:
    return sit(folder, packing, (1, 1, -(-sequences // GLOBAL), 0), None)[0]


def killed(folder: Path, packing: str, sittings: Sequence[Sitting]) -> list[Any]:
    seen, state = list[Any](), None
    for sitting in sittings:
        more, state = sit(folder, packing, sitting, state)
        seen += more
    return seen


shapes = st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
sittings = st.lists(st.tuples(shapes, st.integers(0, 12)), min_size=1, max_size=6)


@settings(max_examples=12, deadline=None)
@given(sittings=sittings, packing=st.sampled_from(["windows", "documents", "none", "mix"]))
def test_any_sittings_see_the_order_of_one(
    folder: Path, sittings: list[tuple[tuple[int, int], int]], packing: str
) -> None:
    # A step takes the same sequences whatever the ranks are, rank by rank within a micro-batch.
    seen = killed(folder, packing, [(*shape, steps, 0) for shape, steps in sittings])
    assert seen == undisturbed(folder, packing, len(seen))[: len(seen)]


@pytest.mark.parametrize("packing", ["windows", "documents", "mix"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_over_kills_and_changes_of_world_size_is_one_epoch(folder: Path, packing: str, workers: int) -> None:
    size = 40 if packing == "mix" else make_prepared(folder, packing).splits.order.size(0)
    steps = -(-size // GLOBAL)
    seen = killed(folder, packing, [(1, 1, 3, workers), (2, 1, 2, workers), (1, 2, steps - 5, 0)])
    whole = undisturbed(folder, packing, size)
    assert seen == whole
    if packing != "mix":
        epoch = Counter(pair for sequence in seen[:size] for pair in sequence)
        again = undisturbed(folder, packing, 3 * size)
        assert epoch == Counter(pair for sequence in again[:size] for pair in sequence)
        if packing == "windows":  # the number of sequences is that of every epoch
            assert epoch == Counter(pair for sequence in again[size : 2 * size] for pair in sequence)
            assert again[:size] != again[size : 2 * size]


def make_prepared(folder: Path, packing: str) -> TokenDataModule:
    data = make(folder, packing)
    data.prepare_data()
    return data


def test_prefetched_batches_do_not_count(folder: Path) -> None:
    data = make(folder, "windows", workers=1)
    data.trainer = OneRank(0, 1, 1)  # type: ignore[assignment]
    data.prepare_data()
    list(islice(data.train_dataloader(), 5))
    assert data.state_dict()["samples"] == 0
    data.trainer.ready = 3  # type: ignore[union-attr]
    assert data.state_dict()["samples"] == 3 * GLOBAL
