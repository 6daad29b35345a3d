"""A cache of transformers as the cache of our attention, so that everything `generate` does with its cache works.

transformers owns the keys and values, and what plugins remember: it grows, reorders (beam search), crops (assisted
decoding) and repeats them.

Letters: C values per position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pkm_lightning.model.cache import DecodingCache, LayerCache, PluginPast, positions_and_mask


class ForeignPast(PluginPast):
    """The past of a plugin as further layers of the keeper, which it grows, reorders and crops with all others."""

    def __init__(self, cache: ForeignCache) -> None:
        super().__init__(cache)
        self._foreign = cache

    def extend(self, name: str, new_BTX: Tensor, before: int, fill: float) -> Tensor:
        """Appends T positions; returns them and the `before` ones in front of them, (B, before + T, ...)."""
        B, T, *rest = new_BTX.shape
        whole_BPX = self._foreign.remember(new_BTX.reshape(B, T, -1)).unflatten(-1, rest or (1,))
        if not rest:
            whole_BPX = whole_BPX.squeeze(-1)
        front_BTX = new_BTX.new_full((B, before, *rest), fill)
        return torch.cat([front_BTX, whole_BPX], 1)[:, -(before + T) :]

    def part(self, name: str) -> ForeignPast:
        """Returns the past of a plugin within this one: the order of what is remembered distinguishes all."""
        return self


class ForeignLayerCache(LayerCache):
    """Keys and values of one layer in a cache of transformers, or of this forward alone."""

    def __init__(self, cache: ForeignCache, layer: int) -> None:
        super().__init__(cache)
        self._keeper, self._layer, self._past = cache.keeper, layer, ForeignPast(cache)

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
        self._remembered = 0

    def remember(self, new_BTC: Tensor) -> Tensor:
        """Appends T positions to what the call of the same number in earlier forwards appended; returns all, (B, P, C).

        A model makes the same calls in the same order in every forward.

        Raises:
            ValueError: earlier tokens of the keeper come from a forward without this call.
        """
        if self.keeper is None:
            return new_BTC
        number = len(self.layers) + self._remembered
        self._remembered += 1
        while len(self.keeper.layers) <= number:
            self.keeper.layers.append(DynamicLayer())
        # In the place of keys; a cache reorders and crops values along with them.
        keys_B1PC, _ = self.keeper.layers[number].update(new_BTC.unsqueeze(1), new_BTC[:, None, :, :0])
        whole_BPC: Tensor = keys_B1PC.squeeze(1)
        before = whole_BPC.shape[1] - new_BTC.shape[1]
        if before != self.length:
            raise ValueError(
                f"cache: it holds {self.length} tokens, and a plugin has seen {before} of them; give the one that this "
                "model has returned, or begin with an empty one."
            )
        return whole_BPC

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
