"""A cache of transformers as the cache of our attention, so that everything `generate` does with its cache works.

transformers owns the keys and values: it grows, reorders (beam search), crops (assisted decoding) and repeats them.
"""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from pkm_lightning.model.cache import DecodingCache, LayerCache, positions_and_mask


class ForeignLayerCache(LayerCache):
    """Keys and values of one layer in a cache of transformers, or of this forward alone."""

    def __init__(self, cache: ForeignCache, layer: int) -> None:
        super().__init__(cache)
        self._keeper, self._layer = cache.keeper, layer

    def extend(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Appends T positions; returns the keys and values of all P + T positions."""
        if self._keeper is None:
            return k_BGTC, v_BGTC
        keys_BGPC, values_BGPC = self._keeper.update(k_BGTC, v_BGTC, self._layer)
        return keys_BGPC, values_BGPC


class ForeignCache(DecodingCache):
    """The view of one forward on `keeper`, a cache of transformers; without one, of a padded batch that is not cached.

    Args:
        keeper: holds the keys and values of the tokens before this forward, or None.
        valid_BP: False at padding, for all tokens so far and those of this forward.
        n_layers: layers of the model.

    Attributes:
        is_padded: whether any token is padding.
    """

    def __init__(self, keeper: Cache | None, valid_BP: Tensor, n_layers: int) -> None:
        batch, capacity = valid_BP.shape
        self.keeper = keeper
        super().__init__(n_layers=0, batch=batch, capacity=capacity, device=valid_BP.device)
        self.length = 0 if keeper is None else int(keeper.get_seq_length())
        self.layers = [ForeignLayerCache(self, layer) for layer in range(n_layers)]
        self._valid_BP, self.is_padded = valid_BP, not bool(valid_BP.all())

    def begin(self, input_ids_BT: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns positions and attention mask as the base class does; padding may stand anywhere.

        Raises:
            ValueError: the mask is not as long as the cached and the new tokens together.
        """
        total = self.length + input_ids_BT.shape[1]
        if self._valid_BP.shape != (len(input_ids_BT), total):
            raise ValueError(
                f"attention_mask has the shape {tuple(self._valid_BP.shape)}; it must cover the {self.length} cached "
                f"tokens and the {input_ids_BT.shape[1]} new ones: ({len(input_ids_BT)}, {total})."
            )
        return positions_and_mask(self._valid_BP, self.length, is_padded=self.is_padded)

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences `rows_B`, in that order."""
        if self.keeper is not None:
            self.keeper.batch_select_indices(rows_B)
        self._valid_BP, self.batch = self._valid_BP[rows_B], len(rows_B)
