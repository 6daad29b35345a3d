"""The cache of a pretrained model: our preallocated buffers behind the interface that transformers' layers call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pkm_lightning.model.cache import DecodingCache, LayerCache


class PretrainedCache(DecodingCache):
    """A `DecodingCache` whose keys and values transformers' attention writes and reads.

    Attributes:
        states: what a forward of transformers takes as its cache.
    """

    def __init__(self, *, n_layers: int, batch: int, capacity: int, device: torch.device) -> None:
        super().__init__(n_layers=n_layers, batch=batch, capacity=capacity, device=device)
        self.states = Cache(layers=[_Layer(self, layer) for layer in self.layers])


class _Layer(CacheLayerMixin):
    """One layer of it. Transformers asks for lengths and adds positions; batches and capacity are the cache's own."""

    is_sliding = False

    def __init__(self, cache: DecodingCache, layer: LayerCache) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the buffers are made with the first keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends positions; returns the keys and values of all."""
        return self._layer.extend(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys in the next attention, and the position of the first."""
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of positions before the next ones."""
        return self._cache.length

    def get_max_length(self) -> int:
        """Returns the capacity."""
        return self._cache.capacity
