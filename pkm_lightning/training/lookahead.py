"""Prefetch of table rows in the loops of the Trainer: whoever pulls a micro-batch sees the next one, whose row ids a
thread computes and whose rows it reads.

Lightning pulls one micro-batch ahead from a loader without a length, to learn whether it is the last; a loader with a
length is pulled ahead here. Where the loader or its data module keeps a position (`state_dict`) it is not, since a
checkpoint would hold the position of the next micro-batch: reads start when their batch is pulled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, LightningModule
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pkm_lightning.data.base import defines, is_endless, keeps_position
from pkm_lightning.ffn import FFNContext, HasRowIds
from pkm_lightning.memory.row_prefetch import Reads, RowPrefetcher, Tokens

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy

    from pkm_lightning.memory import ValueTable
    from pkm_lightning.model import Transformer

_END = object()


class Lookahead:
    """A loader whose micro-batches are shown to `observe`, with `ahead` before the one in front is given.

    All else of the loader is reached through it.

    Args:
        loader: any iterable.
        ahead: whether to pull one micro-batch ahead.
        observe: called with the iteration and each micro-batch.
        end: called with an iteration that is over or abandoned, and `keep=True` where its last micro-batch is still to
            be computed.
    """

    def __init__(
        self, loader: Any, *, ahead: bool, observe: Callable[[object, Any], None], end: Callable[..., None]
    ) -> None:
        # Past __setattr__, which is the loader's.
        self.__dict__.update(_loader=loader, _ahead=ahead, _observe=observe, _end=end)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        iteration, batches = object(), iter(self._loader)
        keep = False
        try:
            if not self._ahead:
                for batch in batches:
                    self._observe(iteration, batch)
                    yield batch
                keep = True
                return
            batch, failure = self._pull(batches, iteration)
            while batch is not _END:
                following, later = self._pull(batches, iteration) if failure is None else (_END, None)
                yield batch
                batch, failure = following, later
            if failure is not None:
                raise failure
        finally:
            self._end(iteration, keep=keep)

    def _pull(self, batches: Iterator[Any], iteration: object) -> tuple[Any, Exception | None]:
        """Returns the next micro-batch, or what went wrong: an error of the data must not come a step early."""
        try:
            batch = next(batches, _END)
        except Exception as error:
            return _END, error
        if batch is not _END:
            self._observe(iteration, batch)
        return batch, None


class PositionedLookahead(Lookahead):
    """A loader that keeps its position, which Lightning stores in checkpoints."""

    # From Python 3.12 on a protocol does not see what `__getattr__` reaches.
    def state_dict(self) -> dict[str, Any]:
        """Returns the loader's position."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at a saved position."""
        self._loader.load_state_dict(state_dict)


class LoaderWrapping:
    """Takes the place of `Strategy.process_dataloader`, by which Lightning lets a strategy wrap the loaders of a run.

    Its `batch_to_device` takes that of the strategy.

    Args:
        strategy: of the Trainer. Its module has built the model before the first loader is asked for.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy, self._process, self._move = strategy, strategy.process_dataloader, strategy.batch_to_device
        # One for all loaders: training goes on with what it has fetched before a validation.
        self._prefetchers: dict[torch.device, RowPrefetcher] = {}

    def __call__(self, loader: object) -> object:
        """Returns the loader as the strategy wraps it, with the prefetch of rows where a table has a use for it."""
        processed: object = self._process(loader)
        model: Transformer = self._strategy.lightning_module.model  # type: ignore[union-attr,assignment]
        device = model.embedding.weight.device
        plugins = [plugin for _, _, plugin in model.plugins() if isinstance(plugin, HasRowIds)]
        tables = [table for table in model.value_tables if is_prefetched(table, device)]
        if not plugins or not tables:
            return processed
        prefetcher = self._prefetchers.setdefault(device, RowPrefetcher(device))

        def observe(iteration: object, batch: Any) -> None:
            fields = _tokens(batch)
            if fields is None:
                return
            # Copies: a loader may use the memory of a micro-batch for its next one. Lightning validates in inference
            # mode, whose tensors, and views of them, do not count what is written to them.
            with torch.inference_mode(False):
                tokens = tuple(None if field is None else field.clone() for field in fields)
            prefetcher.submit(iteration, tables, lambda: _reads(plugins, tokens, device), tokens)

        has_position = defines(processed, "state_dict")
        data = self._strategy.lightning_module.trainer.datamodule  # type: ignore[union-attr]
        ahead = sized_len(processed) is not None and not has_position and not _may_count(data)
        kind = PositionedLookahead if keeps_position(processed) else Lookahead
        return kind(processed, ahead=ahead, observe=observe, end=prefetcher.end)

    def batch_to_device(self, batch: Any, *arguments: Any, **named: Any) -> Any:
        """Moves a micro-batch, in the place of `Strategy.batch_to_device`; the prefetched reads then know it."""
        moved = self._move(batch, *arguments, **named)
        if self._prefetchers and not self._may_change():
            before, after = _tokens(batch), _tokens(moved)
            # One that comes from a device is not compared, which would wait for it.
            if before is not None and after is not None and all(_is_none_or_on_host(field) for field in before):
                for prefetcher in self._prefetchers.values():
                    prefetcher.follow(before, after)
        return moved

    def _may_change(self) -> bool:
        """Returns whether hooks of the user may give the device other tokens than the host has."""
        module = self._strategy.lightning_module
        holders = [(module, LightningModule), (module.trainer.datamodule, LightningDataModule)]  # type: ignore[union-attr]
        return any(
            holder is not None and is_overridden(hook, holder, parent=parent)
            for holder, parent in holders
            for hook in ("transfer_batch_to_device", "on_after_batch_transfer")
        )


def _may_count(data: LightningDataModule | None) -> bool:
    """Returns whether a data module may count the micro-batches that its loaders give.

    One without end may not: Lightning pulls ahead from its training loader, which has no length.
    """
    if data is None or is_endless(data):
        return False
    return defines(data, "state_dict")


def wrap_loaders(trainer: L.Trainer | None) -> None:
    """Makes the next loaders of a Trainer, if there is one, prefetch rows; a second call changes nothing."""
    if trainer is not None and not isinstance(trainer.strategy.process_dataloader, LoaderWrapping):
        wrapping = LoaderWrapping(trainer.strategy)
        trainer.strategy.process_dataloader = wrapping  # type: ignore[method-assign, assignment]
        trainer.strategy.batch_to_device = wrapping.batch_to_device  # type: ignore[method-assign]


def is_prefetched(table: ValueTable, device: torch.device) -> bool:
    """Returns whether rows of `table` come from elsewhere than the `device` of the model, and can be fetched ahead."""
    if table.is_streamed:
        return True
    # With learning=dense every row changes in every step.
    changes_everywhere = any(parameter.requires_grad for parameter in table.parameters())
    return table.stays_on_cpu and device.type != "cpu" and not table.is_split and not changes_everywhere


def _tokens(batch: object) -> Tokens | None:
    """Returns the fields of a micro-batch that ids of rows may follow from; None if `batch` is none of tokens."""
    if not isinstance(batch, dict) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    fields = tuple(batch.get(name) for name in ("input_ids", "valid", "doc_ids"))
    return fields if all(field is None or isinstance(field, Tensor) for field in fields) else None


def _is_none_or_on_host(field: Tensor | None) -> bool:
    return field is None or field.device.type == "cpu"


def _reads(plugins: Sequence[HasRowIds], tokens: Tokens, device: torch.device) -> Mapping[object, Reads]:
    """Returns the table reads of each plugin, for tokens that are still on the host."""
    input_ids, valid, doc_ids = (None if field is None else field.to(device) for field in tokens)
    assert input_ids is not None
    context = FFNContext(input_ids, valid, doc_ids)
    return {plugin: plugin.row_ids(context) for plugin in plugins}
