"""Decoding one token per sequence: a Memory+ layer and the dense FFN that it replaces, at batches of 1, 8 and 64.

    python scripts/bench_decode.py [--device cuda] [--out]

Both layers start from cold caches, as in a model whose other layers have used the caches in between, so the time of a
small batch is that of reading the weights. On a GPU the table lies in its memory or in host memory, and both layers run
eagerly and as a CUDA graph, which leaves out the cost of launching kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from benchmarks.blocks import TOLERANCE, Block, context_of, forward_error, memory_plus
from benchmarks.case import Case, Options, Row, Way
from benchmarks.inputs import table
from benchmarks.protocol import benchmark
from torch import Tensor, nn

from pkm_lightning.ffn.dense import Dense

CALLS = 10

SMOKE = Block(1, 16, 64, 16, 8, False)
CPU = Block(1, 1024, 4096, 512, 512, False)
GPU = Block(1, 4096, 16384, 1024, 2048, False)


class Decoder:
    """Module as a callable: a call decodes one token of every sequence."""

    def __init__(self, module: nn.Module, x_B1D: Tensor) -> None:
        self.module, self.x_B1D = module.eval(), x_B1D

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor]:
        return (self.module(self.x_B1D, context_of(self.x_B1D)).y_BTD,)


class Replay(Decoder):
    """Decoder that replays a CUDA graph."""

    def __init__(self, module: nn.Module, x_B1D: Tensor) -> None:
        super().__init__(module, x_B1D)
        # A capture needs warmed-up kernels, and warming up on another stream (torch's notes on CUDA graphs).
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().__call__()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.y = super().__call__()

    def __call__(self) -> tuple[Tensor]:
        self.graph.replay()
        return self.y


class Layers(NamedTuple):
    """The layers that are compared; all batch sizes share their weights."""

    dense: nn.Module
    memory: nn.Module
    hosted: nn.Module | None


# Cached: a table of several GB is built once for all batch sizes.
@functools.lru_cache(maxsize=1)
def layers(block: Block, device: torch.device, dtype: torch.dtype) -> Layers:
    """Builds layers of equal width; `hosted` has its table in host memory and is None on the CPU."""
    weight_NV = table(block.n_keys**2, block.dim, dtype, device)
    dense = Dense(dim=block.dim, n_layers=2, hidden_dim=block.hidden).to(device, dtype)
    memory = memory_plus(block, weight_NV, "rows").to(device, dtype)
    hosted = None
    if device.type != "cpu":
        hosted = memory_plus(block, weight_NV.cpu(), "rows", device="cpu").to(device, dtype)
        hosted.load_state_dict(memory.state_dict())
    return Layers(dense, memory, hosted)


def decode_case(block: Block, batch: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case: one token for each of `batch` sequences."""
    dense, memory, hosted = layers(block, device, dtype)
    x_B1D = torch.randn(batch, 1, block.dim, device=device).to(dtype)

    def way(name: str, decoder: Callable[[nn.Module, Tensor], Decoder], module: nn.Module) -> Way:
        return Way(name, functools.partial(decoder, module, x_B1D))

    ways = [way("SwiGLU", Decoder, dense), way("Memory+", Decoder, memory)]
    if hosted is not None:
        ways.append(way("Memory+, table in host memory", Decoder, hosted))
        ways += [way("SwiGLU, CUDA graph", Replay, dense), way("Memory+, CUDA graph", Replay, memory)]
    return Case(
        sizes=f"B={batch} D={block.dim} hidden={block.hidden} N={block.n_keys**2} {dtype}".replace("torch.", ""),
        ways=ways,
        # Eight tokens are enough: the check copies the layer to float64, which is slow.
        error=lambda decoder: forward_error(decoder()[0][:8], decoder.module, x_B1D[:8]),
        tolerance=TOLERANCE[dtype],
        baselines=["SwiGLU"],
        tokens=batch,
        calls=CALLS,
        memory=False,
    )


def plan(options: Options) -> Iterator[Row]:
    """Yields one row per batch size."""
    device, dtype = options.device, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    block = SMOKE if options.smoke else GPU if device.type == "cuda" else CPU
    for batch in (1, 8, 64):
        make = functools.partial(decode_case, block, batch, device, dtype)
        yield Row("R8 decode", make, make, sizes=f"B={batch} D={block.dim}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the plan of the device."""
    benchmark("decode", __doc__, plan, arguments)


if __name__ == "__main__":
    main()
