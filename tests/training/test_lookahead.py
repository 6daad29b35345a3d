"""Prefetch in the loops of the Trainer: the rows of the next micro-batch are there, and nothing else changes.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from stored_files import TokenRows, write_tensors
from tolerances import assert_close
from torch.utils.data import DataLoader, IterableDataset
from toys import VOCAB
from training import fits
from training.token_rows import N, V, batches, settings

from pkm_lightning.errors import CheckpointError
from pkm_lightning.ffn import FFNContext
from pkm_lightning.memory import ValueTable, row_prefetch
from pkm_lightning.memory.row_prefetch import RowPrefetcher
from pkm_lightning.training import lookahead


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


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Results of comparisons of ids, for which the host waits for a GPU."""
    results: list[bool] = []
    compare = row_prefetch._has_same_values

    def spy(*arguments: Any) -> bool:
        results.append(compare(*arguments))
        return results[-1]

    monkeypatch.setattr(row_prefetch, "_has_same_values", spy)
    return results


def run(
    given: dict[str, Any],
    loader: Any,
    *,
    accumulate: int = 1,
    validate: bool = False,
    interval: int = 2,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Returns the trained weights and the held-out loss."""
    module = fits.LanguageModule(given)
    held_out = fits.loader(batches()[:3]) if validate else None
    trainer = fits.trainer(
        accumulate_grad_batches=accumulate, precision="64-true", val_check_interval=interval, **changes
    )
    trainer.fit(module, loader, held_out)
    losses = {n: value for n, value in trainer.callback_metrics.items() if n.startswith("val/")}
    return {**{n: v.clone() for n, v in module.state_dict().items() if "digest" not in n}, **losses}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["sized", "endless"])
def test_rows_of_a_file_are_fetched_ahead_and_the_same(
    tmp_path: Path, hits: list[bool], compared: list[bool], kind: str
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V).bfloat16()})
    loader = fits.loader(batches()) if kind == "sized" else DataLoader(Stream(batches()), batch_size=None)
    # The last validation is in front of the last micro-batch.
    in_memory = run(settings(path), loader, validate=True, interval=5)
    assert hits == []
    mapped = run(settings(path, device="mmap"), loader, validate=True, interval=5)
    assert same(in_memory, {n: v for n, v in mapped.items() if n in in_memory})
    assert hits == [True] * (6 + 3)
    assert compared == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("table-")]


@pytest.mark.parametrize("ffn", ["engram", "ple", "stem"])
def test_plugins_of_the_package_take_the_ids_of_the_thread(
    tmp_path: Path, hits: list[bool], compared: list[bool], ffn: str
) -> None:
    given = fits.settings(f"ffn={ffn}", *(["ffn.rows=20", "ffn.end_id=1"] if ffn == "engram" else []), lr=0.05)
    untrained = fits.LanguageModule(given)
    untrained.configure_model()
    tables = untrained.model.value_tables
    rows = {f"rows.{number}": table.weight.detach().view(table.rows, -1) for number, table in enumerate(tables)}
    path = str(write_tensors(tmp_path / "rows.safetensors", rows))
    given["table"].update(trainable=False, path=path, tensor="rows.{}")
    in_memory = run(given, fits.loader(batches()))
    given["table"]["device"] = "mmap"
    mapped = run(given, fits.loader(batches()))
    assert same({n: v for n, v in in_memory.items() if n in mapped}, mapped)
    assert set(hits) == {True}
    assert compared == []


def tokens_twice(self: TokenRows, context: FFNContext) -> list[tuple[ValueTable, torch.Tensor]]:
    """The row of each token, twice; the ids are a view of the tokens."""
    return [(self._table.table, context.input_ids_BT.reshape(-1, 1).expand(-1, 2))]


def test_a_validation_in_inference_mode_fetches_ids_that_are_the_tokens(
    tmp_path: Path, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V)})
    monkeypatch.setattr(TokenRows, "row_ids", tokens_twice)
    losses = [
        fits.trainer().validate(fits.LanguageModule(settings(path, **table)), fits.loader(batches()), verbose=False)
        for table in ({}, {"device": "mmap"})
    ]
    assert losses[0] == losses[1]
    assert hits == [True] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["mmap", "cpu"])
def test_a_gpu_learns_the_same_from_rows_that_were_fetched_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hits: list[bool], device: str
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V).bfloat16()})
    given = settings(path, device="mmap") if device == "mmap" else settings(device="cpu", learning="rows")
    find = RowPrefetcher.find

    def without_waiting(self: RowPrefetcher, *arguments: Any) -> Any:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return find(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    with monkeypatch.context() as patches:
        patches.setattr(lookahead, "is_prefetched", lambda *_: False)
        plain = run(given, fits.loader(batches()), accelerator="gpu")
    assert hits == []
    monkeypatch.setattr(RowPrefetcher, "find", without_waiting)
    fetched = run(given, fits.loader(batches()), accelerator="gpu")
    assert hits == [True] * 6
    assert plain.keys() == fetched.keys()
    for name, value in plain.items():
        assert_close(fetched[name], value)


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


def next_tokens(module: Any, batch: fits.Batch, dataloader_idx: int) -> fits.Batch:
    return {**batch, "input_ids": (batch["input_ids"] + 1) % VOCAB}


def next_tokens_in_place(module: Any, batch: fits.Batch, number: int) -> fits.Batch:
    batch["input_ids"].add_(1).remainder_(VOCAB)
    return batch


def next_tokens_in_memory(module: Any, batch: fits.Batch, number: int) -> None:
    ids_BT = batch["input_ids"].numpy()  # its writes are counted nowhere
    ids_BT[:] = (ids_BT + 1) % VOCAB


@pytest.mark.parametrize(
    ("hook", "change"),
    [
        ("on_before_batch_transfer", next_tokens),
        ("on_before_batch_transfer", next_tokens_in_place),
        ("on_after_batch_transfer", next_tokens),
        ("on_after_batch_transfer", next_tokens_in_place),
        ("on_train_batch_start", next_tokens_in_place),
        ("on_train_batch_start", next_tokens_in_memory),
    ],
)
def test_other_tokens_than_were_announced_are_read_anew(
    tmp_path: Path, hits: list[bool], monkeypatch: pytest.MonkeyPatch, hook: str, change: Callable[..., Any]
) -> None:
    path = write_tensors(tmp_path / "rows.safetensors", {"rows": torch.randn(N, V)})

    def changed(*arguments: Any) -> Any:
        result = change(*arguments)
        return None if hook == "on_train_batch_start" else result

    monkeypatch.setattr(fits.LanguageModule, hook, changed)
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
