"""What one growing text has been read of: the next turn of a conversation costs its new tokens only."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pkm_lightning.model import Transformer
    from pkm_lightning.model.cache import DecodingCache

#: More tokens than any text has; a cache takes memory as its text grows.
_ANY_LENGTH = 2**31 - 1


class ReadTokens:
    """The tokens that a model has read of one sequence, with the cache that holds them.

    Args:
        model: in evaluation mode.
        context: most tokens that the model reads, or None for any number.

    Attributes:
        ids: the tokens in the cache.
    """

    def __init__(self, model: Transformer, context: int | None = None) -> None:
        self._model, self._capacity = model, _ANY_LENGTH if context is None else context
        self._cache: DecodingCache | None = None
        self.ids: list[int] = []

    def resume(self, ids: list[int], device: torch.device) -> tuple[DecodingCache | None, Tensor]:
        """Returns the cache, cut to what it shares with `ids`, and the other ids, (1, T), at least the last one.

        A model whose plugins read earlier tokens has no cache, and reads everything again.
        """
        if not self._model.is_cacheable:
            self.ids = []
            return None, torch.tensor([ids], device=device)
        if self._cache is None:
            self._cache = self._model.new_cache(1, self._capacity)
        # The last one is read again: its output chooses the first token of the answer.
        pairs = zip(ids[:-1], self.ids, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._cache.truncate(shared)
        self.ids = ids[:shared]
        return self._cache, torch.tensor([ids[shared:]], device=device)

    def forget(self) -> None:
        """Drops everything."""
        self._cache, self.ids = None, []
