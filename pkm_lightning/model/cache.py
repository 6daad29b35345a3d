"""Keys and values that a model keeps while it writes, so that each new token costs one position (Shazeer 2019,
arXiv 1911.02150, section 2.3), and what plugins keep of earlier tokens.

Letters: G key-value heads, L tokens that the buffers have room for, P tokens cached so far, C head dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

#: Tokens by which buffers grow at least. They double otherwise, so that each token is copied about once.
_BLOCK = 128


def positions_and_mask(valid_BP: Tensor, start: int, *, is_padded: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the positions (B, T) and the attention mask (B, 1, T, P) of all columns from `start` on.

    Positions count real tokens from 0. The mask is None where causal attention over all positions, or one new token
    that sees everything, needs none.

    Args:
        valid_BP: False at padding.
        start: columns that are cached, P - T.
        is_padded: whether any of `valid_BP` is False.
    """
    positions_BT = (valid_BP.cumsum(1) - 1).clamp_min(0)[:, start:]
    end = valid_BP.shape[1]
    if not is_padded and (end - start == 1 or start == 0):
        return positions_BT, None
    columns_P = torch.arange(end, device=valid_BP.device)
    causal_TP = columns_P <= columns_P[start:, None]
    # Padding attends to itself: a row of the mask that allows nothing would give NaN.
    own_TP = columns_P == columns_P[start:, None]
    return positions_BT, ((causal_TP & valid_BP[:, None]) | own_TP).unsqueeze(1)


def all_cacheable(plugins: Iterable[tuple[int, str, nn.Module]]) -> bool:
    """Returns whether all plugins state that they read no other token, or take earlier ones from a cache."""
    return all(
        getattr(plugin, "position_wise", False) or getattr(plugin, "uses_past", False) for _, _, plugin in plugins
    )


def check_cacheable(plugins: Iterable[tuple[int, str, nn.Module]]) -> None:
    """Refuses a cache for plugins that need more of earlier tokens than a cache holds.

    Raises:
        ValueError: naming what the plugin lacks.
    """
    if not all_cacheable(plugins):
        raise ValueError(
            "cache: an FFN plugin of the model is neither position_wise nor uses_past; run the whole forward."
        )


class PluginPast:
    """The `pkm_lightning.ffn.Past` of one plugin: all positions, so that the text can be cut back to any length.

    Letters: X any further dimensions.
    """

    def __init__(self, cache: DecodingCache) -> None:
        self._cache = cache
        self._buffers: dict[str, Tensor] = {}
        self._parts: dict[str, PluginPast] = {}

    def extend(self, name: str, new_BTX: Tensor, before: int, fill: float) -> Tensor:
        """Appends T positions; returns them and the `before` ones in front of them, (B, before + T, ...)."""
        start, end = self._cache.length, self._cache.length + new_BTX.shape[1]
        buffer_BLX = _with_room(self._buffers.get(name), new_BTX, self._cache, dim=1)
        self._buffers[name] = buffer_BLX
        buffer_BLX[:, start:end] = new_BTX
        present_BTX = buffer_BLX[:, max(0, start - before) : end]
        if before <= start:
            return present_BTX
        B, _, *rest = new_BTX.shape
        return torch.cat([new_BTX.new_full((B, before - start, *rest), fill), present_BTX], 1)

    def part(self, name: str) -> PluginPast:
        """Returns the past of a plugin within this one."""
        return self._parts.setdefault(name, PluginPast(self._cache))

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences `rows_B`, in that order; a sequence may be repeated."""
        self._buffers = {name: buffer[rows_B] for name, buffer in self._buffers.items()}
        for part in self._parts.values():
            part.select(rows_B)


def _with_room(buffer: Tensor | None, new: Tensor, cache: DecodingCache, *, dim: int) -> Tensor:
    """Returns the buffer, or a larger copy, with room for new positions; `dim` counts positions."""
    if buffer is not None and buffer.shape[dim] >= cache.room:
        return buffer
    shape = list(new.shape)
    shape[dim] = cache.room
    larger = new.new_empty(shape)
    if buffer is not None:
        larger.narrow(dim, 0, cache.length).copy_(buffer.narrow(dim, 0, cache.length))
    return larger


class LayerCache:
    """Keys and values of one layer, and the past of its plugins, in buffers that grow up to the cache's capacity."""

    def __init__(self, cache: DecodingCache) -> None:
        self._cache = cache
        self.keys_BGLC: Tensor | None = None
        self.values_BGLC: Tensor | None = None
        self._past = PluginPast(cache)

    def past(self, plugin: str) -> PluginPast:
        """Returns what the layer's plugin of this name remembers."""
        return self._past.part(plugin)

    @property
    def is_empty(self) -> bool:
        """Whether no token has been read yet."""
        return self._cache.length == 0

    def extend(self, k_BGTC: Tensor, v_BGTC: Tensor) -> tuple[Tensor, Tensor]:
        """Appends T positions; returns the keys and values of all P + T positions, views of the buffers."""
        start, end = self._cache.length, self._cache.length + k_BGTC.shape[2]
        # Made here, because autocast and engines decide the dtype that keys and values have.
        self.keys_BGLC = _with_room(self.keys_BGLC, k_BGTC, self._cache, dim=2)
        self.values_BGLC = _with_room(self.values_BGLC, v_BGTC, self._cache, dim=2)
        self.keys_BGLC[:, :, start:end] = k_BGTC
        self.values_BGLC[:, :, start:end] = v_BGTC
        return self.keys_BGLC[:, :, :end], self.values_BGLC[:, :, :end]

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences `rows_B`, in that order; a sequence may be repeated."""
        if self.keys_BGLC is not None and self.values_BGLC is not None:
            self.keys_BGLC, self.values_BGLC = self.keys_BGLC[rows_B], self.values_BGLC[rows_B]
        self._past.select(rows_B)


class DecodingCache:
    """What a model remembers of the tokens that it has read, for a batch of sequences that grow together.

    Sequences of unequal lengths are padded on the left: `valid_BT` is False there, and the first real token of each
    sequence has position 0.

    Args:
        n_layers: layers of the model.
        batch: sequences B.
        capacity: most tokens per sequence, padding included; memory is taken as the text grows.
        device: device of the model.
    """

    def __init__(self, *, n_layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.layers = [LayerCache(self) for _ in range(n_layers)]
        self._valid_BL = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self._any_padding = False

    @property
    def room(self) -> int:
        """Tokens per sequence that buffers have room for."""
        return self._valid_BL.shape[1]

    def begin(self, input_ids_BT: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Enters T new tokens; returns their positions (B, T) and their attention mask (B, 1, T, P + T).

        See `positions_and_mask`.

        Raises:
            ValueError: another batch size, more tokens than the capacity, or padding after a real token.
        """
        B, T = input_ids_BT.shape
        if self.batch != B:
            raise ValueError(f"cache: made for {self.batch} sequences, the batch has {B}.")
        end = self.length + T
        if end > self.capacity:
            raise ValueError(
                f"cache: {self.length} tokens and {T} more exceed its capacity of {self.capacity} per sequence."
            )
        new_BT = torch.ones_like(input_ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
        if valid_BT is not None and not bool(valid_BT.all()):
            earlier_B1 = self._valid_BL[:, : self.length].any(1, keepdim=True)
            if bool((torch.cat([earlier_B1, new_BT], 1).int().diff(dim=1) < 0).any()):
                raise ValueError("cache: padding must stand before the first token of its sequence.")
            self._any_padding = True
        self._reserve(end)
        self._valid_BL[:, self.length : end] = new_BT
        return positions_and_mask(self._valid_BL[:, :end], self.length, is_padded=self._any_padding)

    def _reserve(self, tokens: int) -> None:
        """Makes room for `tokens` per sequence; the layers follow when they extend their buffers."""
        if tokens > self.room:
            wanted = max(tokens, 2 * self.room, self.length + _BLOCK)
            larger_BL = self._valid_BL.new_zeros(self.batch, min(wanted, self.capacity))
            larger_BL[:, : self.length] = self._valid_BL[:, : self.length]
            self._valid_BL = larger_BL

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length` of each sequence."""
        self.length = min(self.length, length)

    def advance(self, tokens: int) -> None:
        """Counts the tokens that a forward has entered in all layers."""
        self.length += tokens

    def select(self, rows_B: Tensor) -> None:
        """Keeps the sequences `rows_B` (indices), in that order; a sequence may be repeated."""
        self.batch = len(rows_B)
        self._valid_BL = self._valid_BL[rows_B]
        for layer in self.layers:
            layer.select(rows_B)

    def branch(self, rows_B: Tensor, tokens: int) -> Self:
        """Returns a copy with the sequences `rows_B`, of which each may be repeated, and room for `tokens` more."""
        branch = copy.deepcopy(self)
        branch.capacity = max(branch.capacity, branch.length + tokens)
        branch.select(rows_B)
        return branch
