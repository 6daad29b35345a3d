"""What a micro-batch keeps for its backward, counted by a forward on the meta device, so that plugins need no formula.

Letters: H query heads, G key-value heads, C head dimension, T tokens per sequence; otherwise those of
`pkm_lightning.capacity`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from pkm_lightning.capacity.setting import Setting
    from pkm_lightning.model import Transformer

#: Bytes per logit when the backward of the loss starts: log-probabilities, their gradient and that of the logits, fp32.
_LOGIT_BYTES = 12
#: What autocast runs in 16 bit. It casts an input anew for each call, and so does the count.
_IN_16_BIT = (functional.linear, torch.matmul, torch.bmm, functional.scaled_dot_product_attention)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on a device at the start of a backward: what the layers keep, and the logits of the loss; None: unknown."""

    kept: int | None
    logits: int | None


def activations(model: Transformer, setting: Setting) -> Activations:
    """Returns the figures of one micro-batch: unknown without its shape, or where a plugin does not run on meta."""
    if setting.tokens is None or setting.length is None:
        return Activations(kept=None, logits=None)
    dtype = torch.bfloat16 if setting.item == 2 else None
    count = _counted(model, setting.tokens // setting.length, setting.length, setting.mixed, dtype)
    logits = _LOGIT_BYTES * setting.tokens * model.embedding.num_embeddings
    if count is None:
        return Activations(kept=None, logits=logits)
    kept = count.total
    if setting.checkpointing:  # blocks keep their inputs only, and one block at a time is run again
        kept += sum(count.inputs) + max(count.blocks) - sum(count.blocks)
    return Activations(kept=kept, logits=logits)


# A refused plan looks at many settings of the same micro-batch.
@lru_cache(maxsize=4)
def _counted(model: Transformer, rows: int, length: int, mixed: bool, dtype: torch.dtype | None) -> _Count | None:
    ids_BT = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    # The copy shares nothing with a model that others go on to use, and costs no memory on the meta device.
    model = copy.deepcopy(model).train().to(dtype=dtype)
    model.activation_checkpointing = False
    count = _Count(model)
    with _FusedKernels(torch.bfloat16 if mixed else None), count:
        try:
            model(ids_BT, doc_ids_BT=ids_BT, valid_BT=ids_BT >= 0)
        # A user's plugin may need values, which the meta device has none of.
        except Exception:
            return None
    return count


class _Count(saved_tensors_hooks):
    """Counts the bytes that autograd saves, each storage once, without weights.

    Attributes:
        total: of the whole forward.
        blocks: of each block.
        inputs: sizes of the blocks' inputs.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__(self._pack, lambda saved: saved)
        self.total = 0
        self.blocks: list[int] = []
        self.inputs: list[int] = []
        weights = [*model.parameters(), *model.buffers()]
        # The tensors are held, or a storage that is freed could lend its address to another.
        self._held: dict[int, Tensor] = {weight.untyped_storage()._cdata: weight for weight in weights}
        self._hooks = [
            handle
            for block in model.blocks
            for handle in (block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave))
        ]

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = saved
            self.total += storage.nbytes()
        return saved

    def _enter(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs.append(inputs[0].nbytes)
        self._before = self.total

    def _leave(self, *_: object) -> None:
        self.blocks.append(self.total - self._before)

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._held.clear()
        for handle in self._hooks:
            handle.remove()


class _FusedKernels(TorchFunctionMode):
    """Replaces attention by what its fused kernels keep, and casts inputs of products as autocast would to `low`.

    On the meta device torch takes the unfused attention, which keeps all T * T weights, and has no autocast. In mixed
    precision the products of experts and of Tucker cores are counted without casts.
    """

    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self._low = low

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if self._low is not None and func in _IN_16_BIT:
            args = tuple(self._cast(value) for value in args)
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], given.get("attn_mask"))
        return func(*args, **given)

    def _cast(self, value: Any) -> Any:
        return value.to(self._low) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, outputs, one fp32 number per query, and a mask as a bias in the queries' dtype."""

    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        # Laid out as the queries, so that joining the heads copies nothing.
        y_BHTC = torch.empty_like(q_BHTC)
        sums_BHT = q_BHTC.new_empty(q_BHTC.shape[:3], dtype=torch.float32)
        bias = [] if mask_B1TT is None else [torch.empty_like(mask_B1TT, dtype=q_BHTC.dtype)]
        ctx.save_for_backward(q_BHTC, k_BGTC, v_BGTC, y_BHTC, sums_BHT, *bias)
        return y_BHTC

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError("this forward only counts")
