"""The read background: how often ordinary text reads each row of a model's tables; choices of rows compare with it.

A batch of the background is a sequence, or whatever the caller counts as one. The smaller the batches, the more they
distinguish: a batch that reads every row of a small table would make all rows equal.

Letters: N rows, M = N + 1 counters, S sequences, X reads per sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.adaptation.row_reads import RowIds, RowReads, count_into
from pkm_lightning.adaptation.row_scores import BackgroundReads
from pkm_lightning.checkpoints.tensor_file import read_tensor_file, write_tensor_file
from pkm_lightning.errors import CheckpointError, ConfigError, counted
from pkm_lightning.model import Transformer
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.usage.layer_reads import LayerReads

__all__ = ["ReadBackground", "measure_background"]

_FORMAT = "read background 1"


@dataclass(frozen=True)
class ReadBackground:
    """Reads of each set of tables (`table0`, `table1`, ...) in the batches of a background, on the CPU.

    Args:
        n_batches: number of batches B.
        batches: for each set, in how many batches each row was read, (N,) int32.
        reads: for each set, how often each row was read, (N,) int64.

    Example:
        >>> import torch
        >>> background = ReadBackground(2, {"table0": torch.tensor([2, 0])}, {"table0": torch.tensor([5, 0])})
        >>> background.of("table0").n_batches
        2
    """

    n_batches: int
    batches: Mapping[str, Tensor]
    reads: Mapping[str, Tensor]

    def of(self, name: str, device: torch.device | None = None) -> BackgroundReads:
        """Returns the reads of a set."""
        return BackgroundReads(self.n_batches, self.batches[name].to(device), self.reads[name].to(device))

    def check(self, rows: Mapping[str, int], source: str) -> None:
        """Refuses a background of other tables than a model has.

        Args:
            rows: number of rows of each set of the model.
            source: what the background is called in messages.

        Raises:
            ConfigError: a set is missing, or has another number of rows.
        """
        counted = {name: len(values) for name, values in self.batches.items()}
        if any(counted.get(name) != number for name, number in rows.items()):
            raise ConfigError(
                f"{source} counts the reads of {_in_words(counted)}, but the tables of this model are "
                f"{_in_words(rows)}; measure it on this model, as with finetune.background_path=TEXT."
            )

    def joined(self, other: ReadBackground) -> ReadBackground:
        """Returns the background of the batches of both, which are of the same tables."""
        return self._combined(other, 1)

    def without(self, other: ReadBackground) -> ReadBackground:
        """Returns the background of the batches that `other` lacks, whose batches are among these."""
        return self._combined(other, -1)

    def _combined(self, other: ReadBackground, sign: int) -> ReadBackground:
        return ReadBackground(
            self.n_batches + sign * other.n_batches,
            {name: values + sign * other.batches[name] for name, values in self.batches.items()},
            {name: values + sign * other.reads[name] for name, values in self.reads.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, for a checkpoint."""
        return {"n_batches": self.n_batches, "batches": dict(self.batches), "reads": dict(self.reads)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> ReadBackground:
        """Returns the background of a `state_dict`."""
        return ReadBackground(int(state["n_batches"]), dict(state["batches"]), dict(state["reads"]))

    def save(self, path: str | Path) -> Path:
        """Writes the background as one safetensors file, which `load` reads.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = {f"batches.{name}": value for name, value in self.batches.items()}
        tensors |= {f"reads.{name}": value for name, value in self.reads.items()}
        write_tensor_file(Path(path), tensors, {"format": _FORMAT, "n_batches": str(self.n_batches)})
        return Path(path)

    @staticmethod
    def load(path: str | Path, key: str = "") -> ReadBackground:
        """Reads what `save` has written; `key` stands before the path in messages.

        Raises:
            CheckpointError: it is missing, damaged, or no background.
        """
        tensors, texts = read_tensor_file(Path(path), key)
        if texts.get("format") != _FORMAT:
            raise CheckpointError(
                f"{key}{path} is no read background, as measure_background(...).save(PATH) writes it."
            )
        parts: dict[str, dict[str, Tensor]] = {"batches": {}, "reads": {}}
        for name, values in tensors.items():
            part, _, table = name.partition(".")
            parts[part][table] = values
        return ReadBackground(int(texts["n_batches"]), **parts)


class BackgroundCounter:
    """Counts of one rank, 12 bytes per row.

    Args:
        rows: number of rows of each set.
        device: of the ids.

    Attributes:
        n_batches: batches so far.
    """

    def __init__(self, rows: Mapping[str, int], device: torch.device) -> None:
        self.n_batches = 0
        self._batches = {name: torch.zeros(n, dtype=torch.int32, device=device) for name, n in rows.items()}
        self._reads = {name: torch.zeros(n, dtype=torch.int64, device=device) for name, n in rows.items()}

    def add(self, ids: RowIds, most: int | None = None) -> None:
        """Counts each sequence as a batch, at most the first `most`; never waits for the device."""
        sequences = 0
        for name, of_readers in ids.items():
            counts_M = self._reads[name].new_zeros(len(self._reads[name]) + 1)
            for ids_SX in zip(*(ids_SX[:most] for ids_SX in of_readers), strict=True):
                counts_M.zero_()
                for ids_X in ids_SX:
                    count_into(counts_M, ids_X)
                self._reads[name] += counts_M[:-1]
                self._batches[name] += counts_M[:-1] > 0
            sequences = max(sequences, *(len(ids_SX[:most]) for ids_SX in of_readers), 0)
        self.n_batches += sequences

    def background(self) -> ReadBackground:
        """Returns the sums over the ranks. Collective: call on all ranks."""
        device = next((values.device for values in self._reads.values()), torch.device("cpu"))
        n_batches = sum_over_ranks(torch.tensor(self.n_batches, device=device))
        # Copies: the counters change while a checkpoint is written in the background.
        batches = {name: sum_over_ranks(values).to("cpu", copy=True) for name, values in self._batches.items()}
        reads = {name: sum_over_ranks(values).to("cpu", copy=True) for name, values in self._reads.items()}
        return ReadBackground(int(n_batches), batches, reads)

    def clear(self) -> None:
        """Forgets all batches."""
        self.n_batches = 0
        for values in (*self._batches.values(), *self._reads.values()):
            values.zero_()

    def load(self, background: ReadBackground) -> None:
        """Continues from a background, on one rank so that nothing counts twice."""
        self.n_batches = background.n_batches
        for name, values in self._batches.items():
            values.copy_(background.batches[name])
            self._reads[name].copy_(background.reads[name])


def measure_background(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], object] | None = None,
    by: Literal["sequence", "batch"] = "sequence",
) -> ReadBackground:
    """Returns the reads of `model` in `batches`, in evaluation mode and without gradients.

    Collective where tables are sharded: call on all ranks with equally many batches.

    Args:
        model: a `Transformer`, or any module with memory layers in it.
        batches: what the model is called with: mappings with `input_ids`, or token ids (B, T).
        forward: calls the model with a batch; None: `model(**batch)`, or as a `Transformer` is called.
        by: what counts as a batch of the background.

    Raises:
        ConfigError: the model has no memory layers.

    Example: `docs/finetuning.md`, "In a loop of your own".
    """
    hooks: LayerReads
    ids: dict[str, list[Tensor]] = {}

    def record(layer: int, trace: dict[str, Tensor], batch: dict[str, Tensor], sequences: int) -> None:
        for name, read in reads.of_layer(layer, trace, batch, sequences if by == "sequence" else 1).items():
            ids.setdefault(name, []).extend(read)

    hooks = LayerReads(model, record, observes=lambda _: True)
    try:
        reads = RowReads(hooks)
        if not reads.sets:
            raise ConfigError(f"{type(model).__name__} has no memory layer, so that it has no background.")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        counter = BackgroundCounter(reads.rows, device)
        with in_evaluation(model), torch.no_grad():
            for batch in batches:
                ids.clear()
                call_model(model, batch) if forward is None else forward(batch)
                counter.add(ids)
    finally:
        hooks.close()
    return counter.background()


def call_model(model: nn.Module, batch: Any) -> None:
    """Calls `model` with a mapping that has `input_ids`, or with token ids (B, T)."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if isinstance(model, Transformer):
        model(batch["input_ids"], doc_ids_BT=batch.get("doc_ids"), valid_BT=batch.get("valid"))
    else:
        model(**batch)


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Puts all modules of a model in evaluation mode, and each back in its mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _in_words(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counted(number, 'row')})" for name, number in rows.items()) or "no table"
