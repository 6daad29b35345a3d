"""Loaders are pulled one micro-batch ahead where that changes nothing that anybody can see."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from stored_files import write_tensors
from training import fits
from training.token_rows import N, V, batches, settings

from pkm_lightning.memory.row_prefetch import RowPrefetcher
from pkm_lightning.training.lookahead import LoaderWrapping, Lookahead


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


@pytest.mark.parametrize("batch", [{"input_ids": [1, 2]}, {"input_ids": torch.ones(2), "valid": [True]}, {}, None])
def test_a_batch_that_is_none_of_tokens_is_moved_as_without_prefetch(
    monkeypatch: pytest.MonkeyPatch, batch: Any
) -> None:
    strategy = fits.trainer().strategy
    monkeypatch.setattr(strategy, "batch_to_device", lambda batch: batch)
    wrapping = LoaderWrapping(strategy)
    wrapping._prefetchers[torch.device("cpu")] = RowPrefetcher(torch.device("cpu"))
    monkeypatch.setattr(wrapping, "_may_change", lambda: False)
    assert wrapping.batch_to_device(batch) is batch
