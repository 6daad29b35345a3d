"""The layers below the first plugin, computed once per sequence: while only rows of tables learn, they never change.

Of a pretrained model with a memory in layer 20 of 30, two thirds of each forward are left out.

Letters: B sequences, T positions, D model dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pkm_lightning.model.trunk import Trunk

#: Bytes of hidden states that are kept; sequences that come later are computed each time.
_MOST_BYTES = 2 * 2**30


@contextlib.contextmanager
def lower_layers_once(model: Trunk) -> Iterator[None]:
    """Computes the layers below the first plugin once per sequence of token ids within the block.

    Outputs are those of whole forwards, up to the rounding of matrix products, which may depend on the other sequences
    of a batch. A model whose first layer has a plugin, as all of the package's own have, computes as ever.

    Args:
        model: in evaluation mode, nothing in or below these layers learns or changes.
    """
    first = min((layer for layer, _, _ in model.plugins()), default=0)
    if not first:
        yield
        return
    lower = _LowerLayers(model, first)
    with lower.patched():
        yield


class _Computed(Exception):
    """Carries the output of the lower layers out of a forward whose upper layers nobody needs."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        self.hidden_BTD = hidden_BTD


class _LowerLayers:
    """What the first `count` layers of a model have computed, by sequence.

    Attributes:
        hidden_BTD: their output in the forward that is under way; None: they are to be computed.
    """

    def __init__(self, model: Any, count: int) -> None:
        self._model, self._layers = model, list(model.blocks[:count])
        self._known: dict[bytes, Tensor] = {}
        self._bytes = 0
        self._is_filling = False
        self.hidden_BTD: Tensor | None = None

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Replaces the forwards of the layers, which looks up or computes what the model is called with."""
        hook = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)
        try:
            for layer in self._layers:
                self._patch(layer, is_last=layer is self._layers[-1])
            yield
        finally:
            hook.remove()
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _patch(self, layer: nn.Module, *, is_last: bool) -> None:
        whole = layer.forward

        def forward(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.hidden_BTD is not None:
                return self.hidden_BTD if is_last else hidden_BTD
            output: Tensor = whole(hidden_BTD, *args, **kwargs)
            if is_last and self._is_filling:
                raise _Computed(output)
            return output

        layer.forward = forward

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_filling:
            return
        ids_BT, doc_ids_BT = args[0], kwargs.get("doc_ids_BT")
        if kwargs.get("cache") is not None:
            self.hidden_BTD = None
            return
        keys = _keys(ids_BT, doc_ids_BT)
        missing = [row for row, key in enumerate(keys) if key not in self._known]
        new: dict[bytes, Tensor] = {}
        if missing:
            computed_BTD = self._computed(ids_BT[missing], None if doc_ids_BT is None else doc_ids_BT[missing])
            new = dict(zip([keys[row] for row in missing], computed_BTD, strict=True))
            if self._bytes + computed_BTD.nbytes <= _MOST_BYTES:
                self._bytes += computed_BTD.nbytes
                self._known.update(new)
        self.hidden_BTD = torch.stack([new[key] if key in new else self._known[key] for key in keys])

    @torch.no_grad()
    def _computed(self, ids_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        self.hidden_BTD, self._is_filling = None, True
        try:
            self._model(ids_BT, doc_ids_BT=doc_ids_BT)
        except _Computed as reached:
            return reached.hidden_BTD
        finally:
            self._is_filling = False
        raise AssertionError("the layers were not called")


def _keys(ids_BT: Tensor, doc_ids_BT: Tensor | None) -> list[bytes]:
    """Returns a key per sequence: its ids, padding included, and its documents."""
    rows = [ids_BT] if doc_ids_BT is None else [ids_BT, doc_ids_BT]
    return [row.numpy().tobytes() for row in torch.stack(rows, 1).cpu()]
