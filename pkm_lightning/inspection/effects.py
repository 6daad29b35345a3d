"""What one read adds to the logit of the next token.

The effect of read c of token t is logit(t) minus logit(t) with that read at zero, of the same next token and at the
position of t itself: what the read does to later positions, through attention, is not part of it. All other reads,
of this token and of earlier ones, are made as they are, and later layers choose their own slots anew.

`exact` runs the model once more per read. Since attention is causal, a token's read changes nothing before it: with the
keys and values of the text in a cache, each of these forwards is one of a single token. Tokens are taken from the last
to the first, so that what a masked forward leaves in the cache is never read. `gradient` is the first-order
approximation, d logit / d factor of the read's weight at 1: one forward and one backward per token for all reads.

Letters: R reads of a token over all readers, C those of one reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.inspection.masking import ReadFactors, all_modules
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.usage.slot_readers import Reader

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer
    from pkm_lightning.model.cache import DecodingCache

#: Bytes of keys and values that the copies of a text may take.
_CACHE_BYTES = 2**28
#: Tokens per forward where a model cannot be cached.
_TOKENS = 4096


class _Steps:
    """Forwards of one more token behind each beginning of a text, from the last token to the first.

    Args:
        model: in evaluation mode.
        ids_T: the text.
        batch: most copies of the text that are run together.
    """

    def __init__(self, model: Transformer, ids_T: Tensor, batch: int) -> None:
        self._model, self._ids_T = model, ids_T
        self._cache: DecodingCache | None = None
        if model.is_cacheable:
            with torch.no_grad():
                self._cache = model.new_cache(1, len(ids_T))
                model(ids_T.unsqueeze(0), cache=self._cache)
            self.batch = max(1, min(batch, _CACHE_BYTES // max(1, _bytes_of(self._cache))))
        else:
            self.batch = max(1, min(batch, _TOKENS // len(ids_T)))
        self.copies(self.batch)

    def copies(self, batch: int) -> None:
        """Sets the number of copies of the next forwards, which write to memory of their own."""
        self.batch = batch
        if self._cache is not None:
            with torch.no_grad():
                self._cache.select(torch.zeros(batch, dtype=torch.int64, device=self._ids_T.device))

    def logits(self, place: int, factors: ReadFactors, of_token: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits behind token `place`, (B, W).

        Args:
            place: not above that of the forward before.
            factors: in force.
            of_token: factors of the reads of that token, (B, 1, C) by reader.
        """
        begin = place
        if self._cache is None:
            begin = 0
            earlier = {name: one.new_ones(self.batch, place, one.shape[-1]) for name, one in of_token.items()}
            of_token = {name: torch.cat([earlier[name], one], 1) for name, one in of_token.items()}
        else:
            self._cache.truncate(place)
        factors.of = dict(of_token)
        ids_BT = self._ids_T[begin : place + 1].expand(self.batch, -1)
        hidden_BTD = self._model(ids_BT, cache=self._cache).hidden_BTD
        logits_BW = self._model.unembed(hidden_BTD[:, -1])
        return logits_BW.to(score_dtype(logits_BW))


def _bytes_of(cache: DecodingCache) -> int:
    buffers = [tensor for layer in cache.layers for tensor in (layer.keys_BGLC, layer.values_BGLC)]
    return sum(tensor.nbytes for tensor in buffers if tensor is not None)


@torch.no_grad()
def exact_effects(
    model: Transformer, readers: Mapping[str, Reader], ids_T: Tensor, scored_T: Sequence[int], reads: Mapping[str, int]
) -> dict[str, Tensor]:
    """Returns the effects of all reads of the last tokens of a text by a forward per read, (T, C) by reader.

    Args:
        model: in evaluation mode.
        readers: whose reads are taken.
        ids_T: the text.
        scored_T: whose logits count: the next token of each of the last T tokens.
        reads: reads per token C, by reader.
    """
    places = [(name, c) for name in readers for c in range(reads[name])]
    effects = {name: torch.zeros(len(scored_T), reads[name], dtype=torch.float64) for name in readers}
    with ReadFactors(readers) as factors:
        steps = _Steps(model, ids_T, len(places) + 1)
        if steps.batch == 1:
            steps.copies(2)
        # The first copy reads everything: the difference is then between rows of one batch.
        size = steps.batch - 1
        groups = [places[start : start + size] for start in range(0, len(places), size)]
        of_groups = [_factors_without(group, reads, steps.batch, ids_T.device) for group in groups]
        for back, scored in enumerate(reversed(scored_T), 1):
            for group, of_token in zip(groups, of_groups, strict=True):
                logit_B = steps.logits(len(ids_T) - back, factors, of_token)[:, scored].double().cpu()
                for (name, c), effect in zip(group, (logit_B[0] - logit_B[1:]).tolist(), strict=False):
                    effects[name][-back, c] = effect
    return effects


def _factors_without(
    group: Sequence[tuple[str, int]], reads: Mapping[str, int], batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Returns factors (B, 1, C) by reader: copy n + 1 leaves read n of the group out."""
    keeps = {name: torch.ones(batch, 1, count, dtype=torch.bool, device=device) for name, count in reads.items()}
    for row, (name, c) in enumerate(group, 1):
        keeps[name][row, 0, c] = False
    return keeps


def gradient_effects(
    model: Transformer, readers: Mapping[str, Reader], ids_T: Tensor, scored_T: Sequence[int], reads: Mapping[str, int]
) -> dict[str, Tensor]:
    """Returns the first-order effects of all reads; arguments and shapes as in `exact_effects`.

    Raises:
        ConfigError: a table is quantised, whose reads have no gradient.
    """
    if any(isinstance(module, QuantizedTable) for module in all_modules(readers)):
        raise ConfigError("effects=gradient: reads of a quantised table have no gradient; set effects=exact.")
    effects = {name: torch.zeros(len(scored_T), reads[name], dtype=torch.float64) for name in readers}
    with ReadFactors(readers) as factors, _nothing_learns(model):
        steps = _Steps(model, ids_T, 1)
        for back, scored in enumerate(reversed(scored_T), 1):
            # Else the graph of the forward before would hang on these keys and values.
            steps.copies(1)
            ones = {name: torch.ones(1, 1, count, device=ids_T.device) for name, count in reads.items()}
            of_token = {name: one.requires_grad_() for name, one in ones.items()}
            with torch.enable_grad():
                logit = steps.logits(len(ids_T) - back, factors, of_token)[0, scored]
                grads = torch.autograd.grad(logit, list(of_token.values()), allow_unused=True)
            for name, grad in zip(of_token, grads, strict=True):
                if grad is not None:
                    effects[name][-back] = grad.flatten().double().cpu()
    return effects


@contextlib.contextmanager
def _nothing_learns(model: Transformer) -> Iterator[None]:
    """Lets no parameter require a gradient, and no read be staged, within the block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stages = [(table, table.stage) for table in model.value_tables]
    tables: list[ValueTable] = [table for table, _ in stages]
    for parameter in learning:
        parameter.requires_grad_(False)
    for table in tables:
        table.stage = None
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for table, stage in stages:
            table.stage = stage
