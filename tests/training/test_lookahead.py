"""Prefetch in the loops of the Trainer: the rows of the next micro-batch are there, and nothing else changes.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from stored_files import write_tensors
from torch.utils.data import DataLoader, IterableDataset
from toys import VOCAB
from training import fits

from pkm_lightning.errors import CheckpointError
from pkm_lightning.memory.row_prefetch import RowPrefetcher
from pkm_lightning.training import lookahead
from pkm_lightning.training.lookahead import Lookahead

N, V = 300, 8


class Stream(IterableDataset[Any]):
    """Micro-batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each read was found among those that were fetched ahead."""
    found: list[bool] = []
    find = RowPrefetcher.find

    def spy(self: RowPrefetcher, *arguments: Any) -> Any:
        read = find(self, *arguments)
        found.append(read is not None)
        return read

    monkeypatch.setattr(RowPrefetcher, "find", spy)
    return found


def settings(path: Path | None = None, **table: Any) -> dict[str, Any]:
    made = fits.settings("ffn=dense", "placement=before", lr=0.05)
    made["ffn"] = {"_target_": "stored_files.TokenRows", "rows": N, "row_dim": V}
    made["table"].update(table)
    if path is not None:
        made["table"].update(trainable=False, path=str(path))
    return made


def run(
    given: dict[str, Any], loader: Any, *, accumulate: int = 1, validate: bool = False, interval: int = 2
) -> dict[str, torch.Tensor]:
    """Returns the trained weights and the held-out loss."""
    module = fits.LanguageModule(given)
    held_out = fits.loader(batches()[:3]) if validate else None
    trainer = fits.trainer(accumulate_grad_batches=accumulate, precision="64-true", val_check_interval=interval)
    trainer.fit(module, loader, held_out)
    losses = {n: value for n, value in trainer.callback_metrics.items() if n.startswith("val/")}
    return {**{n: v.clone() for n, v in module.state_dict().items() if "digest" not in n}, **losses}


def batches() -> list[fits.Batch]:
    torch.manual_seed(3)
    return [fits.rows(2) for _ in range(6)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["sized", "endless"])
def test_rows_of_a_file_are_fetched_ahead_and_the_same(tmp_path: Path, hits: list[bool], kind: str) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V).bfloat16()})
    loader = fits.loader(batches()) if kind == "sized" else DataLoader(Stream(batches()), batch_size=None)
    # The last validation is in front of the last micro-batch.
    in_memory = run(settings(path), loader, validate=True, interval=5)
    assert hits == []
    mapped = run(settings(path, device="mmap"), loader, validate=True, interval=5)
    assert same(in_memory, {n: v for n, v in mapped.items() if n in in_memory})
    assert hits == [True] * (6 + 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("table-")]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "lazy_adam"])
def test_rows_that_learn_are_refreshed_before_use(
    monkeypatch: pytest.MonkeyPatch, hits: list[bool], accumulate: int, rule: str
) -> None:
    given = settings(learning="rows")
    given["table"]["optimizer"]["rule"] = rule
    plain = run(given, fits.loader(batches()), accumulate=accumulate)
    # As if the model were on a GPU and the table were not.
    monkeypatch.setattr(lookahead, "is_prefetched", lambda table, device: True)
    fetched = run(given, fits.loader(batches()), accumulate=accumulate)
    assert hits == [True] * 6
    assert same(plain, fetched)


def test_other_tokens_than_were_announced_are_read_anew(
    tmp_path: Path, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V)})

    def change(self: Any, batch: fits.Batch, dataloader_idx: int) -> fits.Batch:
        return {**batch, "input_ids": (batch["input_ids"] + 1) % VOCAB}

    monkeypatch.setattr(fits.LanguageModule, "on_after_batch_transfer", change)
    in_memory = run(settings(path), fits.loader(batches()))
    assert same(in_memory, run(settings(path, device="mmap"), fits.loader(batches())))
    assert hits == [False] * 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda content: content[:200], "ends before row"), (lambda content: bytes(len(content)), "other rows")],
)
def test_a_file_that_changes_ends_the_run_with_its_name(
    tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V)})
    module = fits.LanguageModule(settings(path, device="mmap"))

    class Write(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            path.write_bytes(change(path.read_bytes()))

    with pytest.raises(CheckpointError, match=rf"table.path={path} cannot be read .*{reason}"):
        fits.trainer(callbacks=[Write()]).fit(module, fits.loader(batches()))
    del module
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("table-prefetch")]


class Counted:
    """A loader that records what was pulled, and fails at a place."""

    def __init__(self, batches: list[Any], fails_at: int | None = None) -> None:
        self.batches, self.fails_at, self.pulled, self.epoch = batches, fails_at, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            if number == self.fails_at:
                raise ValueError("bad data")
            self.pulled += 1
            yield batch


class Positioned(Counted):
    """One that keeps its position."""

    def state_dict(self) -> dict[str, int]:
        return {"pulled": self.pulled}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.pulled = state_dict["pulled"]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_loader_is_one_ahead_where_it_may_be(n: int, ahead: bool) -> None:
    seen: list[int] = []
    ended: list[object] = []
    loader = Counted(list(range(n)))
    wrapped = Lookahead(
        loader, ahead=ahead, observe=lambda _, batch: seen.append(batch), end=lambda one, keep: ended.append(one)
    )
    assert len(wrapped) == n
    wrapped.epoch = 2
    assert (loader.epoch, wrapped.epoch) == (2, 2)
    given = []
    for batch in wrapped:
        given.append(batch)
        assert seen == list(range(min(n, batch + 1 + ahead)))
    assert given == list(range(n))
    assert len(ended) == 1


class Data(L.LightningDataModule):
    """A data module with one loader."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._of_training = loader

    def train_dataloader(self) -> Any:
        return self._of_training


class ResumableData(Data):
    """One that saves how many micro-batches its loader has given."""

    def state_dict(self) -> dict[str, int]:
        return {"given": self._of_training.pulled}


class EndlessData(ResumableData):
    """One that does not count them."""

    endless = True


@pytest.mark.parametrize(
    ("data", "loader", "ahead"),
    [
        (Data, Counted, [2, 3, 3]),
        (EndlessData, Counted, [2, 3, 3]),
        (ResumableData, Counted, [1, 2, 3]),
        (Data, Positioned, [1, 2, 3]),
    ],
)
def test_what_keeps_a_position_is_not_read_ahead(
    tmp_path: Path, data: type[Data], loader: type[Counted], ahead: list[int]
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V)})
    counted, pulled = loader(batches()[:3]), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            pulled.append(counted.pulled)
            assert trainer.fit_loop._combined_loader is not None
            (wrapped,) = trainer.fit_loop._combined_loader.flattened
            assert isinstance(wrapped, Lookahead)
            # As a protocol is tested for from Python 3.12 on.
            is_stateful = [inspect.getattr_static(wrapped, name, None) for name in ("state_dict", "load_state_dict")]
            assert all(is_stateful) == (loader is Positioned)

    trainer = fits.trainer(callbacks=[Watch()])
    trainer.fit(fits.LanguageModule(settings(path, device="mmap")), datamodule=data(counted))
    assert pulled == ahead


def test_an_error_of_the_data_comes_when_its_turn_has_come() -> None:
    ended: list[object] = []
    loader = Counted(list(range(3)), fails_at=2)
    batches = iter(Lookahead(loader, ahead=True, observe=lambda *_: None, end=lambda one, keep: ended.append(one)))
    assert [next(batches), next(batches)] == [0, 1]
    assert ended == []
    with pytest.raises(ValueError, match="bad data"):
        next(batches)
    assert len(ended) == 1
