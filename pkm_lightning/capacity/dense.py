"""The dense part of a plan: what a device holds and receives under each strategy, tables excluded.

Letters as in `pkm_lightning.capacity`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.model.sharding import split_dim

if TYPE_CHECKING:
    from pkm_lightning.capacity.setting import Setting
    from pkm_lightning.model import Transformer

#: DeepSpeed 0.19's defaults, in values: the sizes of a bucket, of live, persistent and reused parameters.
_BUCKET, _LIVE, _PERSISTENT, _REUSE = 200_000_000, 1_000_000_000, 100_000, 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class DenseFigures:
    """Bytes on a device, and bytes that it receives per step."""

    weights: int
    gradients: int
    states: int
    gathered: int
    received: int


class _Sizes:
    """Numbers of values. Shares are those of one rank, with each split dimension rounded up, as FSDP2 pads it."""

    def __init__(self, model: Transformer, world: int) -> None:
        tables = {id(weight) for table in model.value_tables for weight in table.parameters()}
        by_block = [list(block.parameters()) for block in model.blocks]
        inside = {id(p) for block in by_block for p in block}
        rest = [p for p in model.parameters() if id(p) not in inside]
        blocks = [[p for p in block if id(p) not in tables] for block in by_block]
        rest = [p for p in rest if id(p) not in tables]
        everything = [p for part in (*blocks, rest) for p in part]
        self.all = sum(p.numel() for p in everything)
        self.trained = sum(p.numel() for p in everything if p.requires_grad)
        self.rest = sum(p.numel() for p in rest)
        self.block = max((sum(p.numel() for p in block) for block in blocks), default=0)
        self.large = sum(p.numel() for p in everything if p.numel() > _PERSISTENT)
        self.share = sum(_share(p, world) for p in everything)
        self.trained_share = sum(_share(p, world) for p in everything if p.requires_grad)
        self.rest_share = sum(_share(p, world) for p in rest)


def _share(parameter: nn.Parameter, world: int) -> int:
    if not parameter.ndim:
        return 1
    split = parameter.shape[split_dim(parameter.shape, world)]
    return -(-split // world) * (parameter.numel() // max(1, split))


def dense_figures(model: Transformer, setting: Setting) -> DenseFigures | None:
    """Returns the figures, or None for an unknown strategy."""
    size = _Sizes(model, setting.world)
    if setting.strategy in ("single", "ddp"):
        return _whole(size, setting)
    if setting.strategy == "fsdp":
        return _fsdp(size, setting)
    if setting.strategy.startswith("zero"):
        return _zero(size, setting, stage=int(setting.strategy[4:]))
    return None


def _whole(size: _Sizes, setting: Setting) -> DenseFigures:
    trained = size.trained * setting.item
    # The all-reduce of the gradients as a ring.
    return DenseFigures(
        weights=size.all * setting.item,
        gradients=trained,
        states=2 * trained,
        gathered=0,
        received=2 * trained * (setting.world - 1) // setting.world,
    )


def _fsdp(size: _Sizes, setting: Setting) -> DenseFigures:
    others, item = setting.world - 1, setting.item
    # Blocks are gathered in forward and again in backward; parameters outside blocks stay gathered in between.
    gathers = setting.accumulate * (2 * size.share - size.rest_share)
    # `FSDP2.block_backward_sync` keeps gradients whole until the last micro-batch of a step.
    whole_gradients = size.trained if setting.accumulate > 1 else 0
    return DenseFigures(
        weights=size.share * item,
        gradients=(size.trained_share + whole_gradients) * item,
        states=2 * size.trained_share * item,
        gathered=(size.rest + 2 * size.block + max(size.rest, size.block)) * item,
        received=others * (gathers + size.trained_share) * item,
    )


def _zero(size: _Sizes, setting: Setting, *, stage: int) -> DenseFigures:
    world, item, accumulate = setting.world, setting.item, setting.accumulate
    trained, large, share = size.trained, size.large, -(-size.trained // world)
    bucket = min(trained, _BUCKET) if stage > 1 else 0
    # ZeRO-3 releases a weight whose next use, in backward, is too far off, and gathers it again.
    twice = max(0, large - _REUSE // 2)
    # Stages 1 and 2 all-reduce gradients, stage 1 once per step, and then gather the updated weights.
    if stage == 3:
        sent = accumulate * (large + twice + trained) + size.all - large
    else:
        sent = (2 * trained if stage == 1 else 2 * accumulate * trained) + trained
    # `LanguageModule` scales accumulated gradients. Stages 1 and 2 read and write them whole, in fp32; stage 3 scales
    # each rank's partition in place.
    corrected = 8 * trained if accumulate > 1 and stage < 3 else 0
    return DenseFigures(
        weights=(-(-size.all // world) if stage == 3 else size.all) * item,
        gradients=(trained if stage == 1 else share + bucket) * item,
        states=12 * share,
        gathered=min(size.all, _LIVE) * item if stage == 3 else 0,
        received=(sent * item + corrected) * (world - 1) // world,
    )
