"""Small convolutional networks for images of digits: without memory, wider, and with a product-key memory.

Letters: B images, T positions of a feature map (h * w), D its channels.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning import MemoryPlus, ValueTable

#: Without memory, and wider without memory; with memory, with queries and keys that are not normalised, which lets
#: slots die, and that with revival.
VARIANTS = ("plain", "wide", "memory", "unnormalised", "revived")
CHANNELS = (16, 32, 64)
N_KEYS, HEADS, KNN, KEY_DIM = 128, 2, 8, 32  # 128 * 128 slots, of which each position reads 2 * 8


class MemoryBlock(nn.Module):
    """A memory that every position of a feature map reads, added to the map."""

    def __init__(self, dim: int, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        table = ValueTable(rows=N_KEYS**2, dim=dim, learning="rows")  # one that the layer makes would learn densely
        self.memory = MemoryPlus(
            dim=dim, table=table, n_keys=N_KEYS, heads=HEADS, knn=KNN, key_dim=KEY_DIM, value_dim=dim,
            qk_norm=normalised,
        )  # fmt: skip

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """Lays the map out as tokens, (B, T, D), and back."""
        x_BTD = x_BDhw.flatten(2).transpose(1, 2)
        read_BTD = self.memory(self.norm(x_BTD)).y_BTD
        return x_BDhw + read_BTD.transpose(1, 2).view_as(x_BDhw)


def network(size: int, channels: Sequence[int] = CHANNELS, memory: MemoryBlock | None = None) -> nn.Sequential:
    """Builds three convolutions down to a map of 4 x 4, the memory if there is one, and a classifier of the mean."""
    strides = (2, 2, 2) if size > 8 else (1, 2, 1)
    layers: list[nn.Module] = []
    for into, out, stride in zip((1, *channels[:-1]), channels, strides, strict=True):
        layers += [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    if memory is not None:
        layers.append(memory)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))


def build(variant: str, size: int) -> nn.Sequential:
    """Builds one of `VARIANTS` for images of `size` x `size`."""
    if variant == "wide":
        return network(size, wide_channels(size))
    if variant == "plain":
        return network(size)
    return network(size, memory=MemoryBlock(CHANNELS[-1], normalised=variant == "memory"))


@functools.cache
def wide_channels(size: int) -> tuple[int, ...]:
    """Returns the channels with which the network costs as many FLOPs without a memory as `CHANNELS` with one."""
    target = flops(build("memory", size), size)
    widths = [tuple(round(channels * (1 + step / 200)) for channels in CHANNELS) for step in range(200)]

    def cost(channels: tuple[int, ...]) -> int:
        return flops(network(size, channels), size)

    above = bisect.bisect_left(widths, target, key=cost)
    return min(widths[above - 1 : above + 1], key=lambda channels: abs(cost(channels) - target))


def flops(model: nn.Module, size: int) -> int:
    """Counts the forward FLOPs per image; the operators of a memory have formulas of their own."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, size, size))
    return counter.get_total_flops()
