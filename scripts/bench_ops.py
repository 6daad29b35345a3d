"""The operations of a sparse memory and other packages' ways of doing them: retrieval, lookup, gradients, whole layers.

    python scripts/bench_ops.py [--device cuda] [--only lookup] [--out]

A column `x WAY` shows how many times faster a line is than that way, by the medians of one run. `auto` is the backend
that the package chooses on this device, `eager` its fallback in plain torch. GB/s count the bytes that any way must
move. `layer` rows run whole modules of other packages with the same weights; they are skipped where those are not
installed.

Letters: F dimension of a half key, R sampled rows or tokens; `k` is K of one head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from benchmarks.case import Case, Options, Row, Run, Way, relative_error
from benchmarks.inputs import Lookup, Reads
from benchmarks.layers import peer_layer, pkm_layer
from benchmarks.protocol import benchmark
from benchmarks.ways import (
    bag,
    gather_einsum,
    gather_einsum_dot,
    search,
    search_given_scores,
    textbook,
    textbook_combine,
)
from torch import Tensor

from pkm_lightning.ops import gathered_dot, product_combine, weighted_gather
from pkm_lightning.ops.row_gradients import row_gradients
from pkm_lightning.ops.segments import read_segments, read_sources

# Sums of hundreds of terms in fp32; bf16 rounds products of the inputs to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# A near tie that float64 decides otherwise moves a whole row of a gradient.
TIES = 1e-2


class Retrieval(NamedTuple):
    """Sizes of a search: T queries of H heads among S sub-keys per half, the best k each."""

    tokens: int
    heads: int
    n_keys: int
    dim: int
    k: int

    def __str__(self) -> str:
        return f"T={self.tokens} H={self.heads} S={self.n_keys} F={self.dim} k={self.k} float32"


def scores_of(scores_2HTS: Tensor, ids_HTK: Tensor) -> Tensor:
    """Returns the scores of slots, sums of the scores of their halves."""
    n_keys = scores_2HTS.shape[-1]
    long = ids_HTK.long()
    return scores_2HTS[0].gather(-1, long // n_keys) + scores_2HTS[1].gather(-1, long % n_keys)


def combine_case(sizes: Retrieval, device: torch.device) -> Case:
    """Builds the case: from ranked halves to slots."""
    scores_2HTS = torch.randn(2, sizes.heads, sizes.tokens, sizes.n_keys, device=device)
    values_2HTK, chosen_2HTK = torch.topk(scores_2HTS, sizes.k)
    # The package keeps ids in int32, torch.topk gives int64.
    indices_2HTK = chosen_2HTK.int()
    halves = values_2HTK[0], indices_2HTK[0], values_2HTK[1], indices_2HTK[1]

    @functools.cache
    def expected() -> Tensor:
        wide = values_2HTK.double()
        return textbook_combine(wide[0], chosen_2HTK[0], wide[1], chosen_2HTK[1], sizes.n_keys, sizes.k)[0]

    def error(run: Run) -> float:
        sums_HTK, ids_HTK = run()
        return relative_error([sums_HTK, scores_of(scores_2HTS, ids_HTK)], [expected()] * 2)

    def way(name: str, combine: Callable[..., tuple[Tensor, Tensor]], *index: Tensor) -> Way:
        keys1, keys2 = index or (halves[1], halves[3])
        arguments = halves[0], keys1, halves[2], keys2, sizes.n_keys, sizes.k
        return Way(name, lambda: lambda: combine(*arguments))

    return Case(
        sizes=str(sizes),
        ways=[
            way("textbook", textbook_combine, *chosen_2HTK),
            way("auto", product_combine),
            way("eager", functools.partial(product_combine, backend="eager")),
        ],
        error=error,
        tolerance=TOLERANCE[torch.float32],
        baselines=["textbook"],
        peers=["textbook"],
    )


def retrieval_case(sizes: Retrieval, device: torch.device, backward: bool) -> Case:
    """Builds the case: from queries and sub-keys to slots and scores, and with `backward` to their gradients."""
    q_2HTF = torch.randn(2, sizes.heads, sizes.tokens, sizes.dim, device=device)
    keys_2HSF = torch.randn(2, sizes.heads, sizes.n_keys, sizes.dim, device=device)
    upstream_HTK = torch.rand(sizes.heads, sizes.tokens, sizes.k, device=device)
    inputs = (q_2HTF.requires_grad_(backward), keys_2HSF.requires_grad_(backward))

    @functools.cache
    def expected() -> list[Tensor]:
        """Returns scores of the halves, best sums and gradients."""
        wide = [value.detach().double().requires_grad_(backward) for value in inputs]
        sums_HTK, _ = textbook(*wide, sizes.k)
        gradients = torch.autograd.grad(sums_HTK, wide, upstream_HTK.double()) if backward else ()
        scores_2HTS = torch.einsum("xhtf,xhsf->xhts", *(value.detach() for value in wide))
        return [scores_2HTS, sums_HTK.detach(), *gradients]

    def error(run: Run) -> float:
        sums_HTK, ids_HTK, *gradients = run()
        scores_2HTS, *theirs = expected()
        return relative_error([scores_of(scores_2HTS, ids_HTK), sums_HTK, *gradients], [theirs[0], *theirs])

    def way(name: str, find: Callable[..., tuple[Tensor, Tensor]]) -> Way:
        def run() -> tuple[Tensor, ...]:
            sums_HTK, ids_HTK = find(*inputs, sizes.k)
            gradients = torch.autograd.grad(sums_HTK, inputs, upstream_HTK) if backward else ()
            return sums_HTK.detach(), ids_HTK, *gradients

        return Way(name, lambda: run)

    return Case(
        sizes=str(sizes),
        ways=[
            way("textbook", textbook),
            way("auto", functools.partial(search, backend="auto")),
            way("auto, given scores", search_given_scores),
            way("eager", functools.partial(search, backend="eager")),
        ],
        error=error,
        tolerance=TIES if backward else TOLERANCE[torch.float32],
        baselines=["textbook"],
        peers=["textbook"],
    )


def lookup_case(sizes: Lookup, device: torch.device, dtype: torch.dtype, memory: bool) -> Case:
    """Builds the case: weighted sums of rows."""
    reads = Reads.draw(sizes, dtype, device)
    expected_RV = functools.cache(reads.sums)

    def way(name: str, read: Callable[..., Tensor]) -> Way:
        def run() -> tuple[Tensor]:
            with torch.no_grad():
                return (read(*reads[:3]),)

        return Way(name, lambda: run)

    row_bytes = sizes.dim * dtype.itemsize
    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[
            way("embedding_bag", bag),
            way("gather + einsum", gather_einsum),
            way("auto", weighted_gather),
            way("eager", functools.partial(weighted_gather, backend="eager")),
        ],
        error=lambda run: relative_error([run()[0][reads.tokens_R]], [expected_RV()]),
        tolerance=TOLERANCE[dtype],
        baselines=["embedding_bag", "gather + einsum"],
        peers=["embedding_bag", "gather + einsum"],
        # Each read moves a row, an int32 id and a weight; each token writes a sum.
        moved=sizes.tokens * (sizes.reads * (row_bytes + 4 + dtype.itemsize) + row_bytes),
        memory=memory,
    )


def lookup_backward_case(sizes: Lookup, device: torch.device, dtype: torch.dtype, memory: bool) -> Case:
    """Builds the case: gradients of weights and table, without the forward pass."""
    reads = Reads.draw(sizes, dtype, device)
    inputs = reads.table_NV.requires_grad_(), reads.weights_TK.requires_grad_()
    expected = functools.cache(torch.no_grad()(lambda: [reads.row_gradients(), reads.dots()]))

    def way(name: str, read: Callable[..., Tensor], coalesce: bool = False) -> Way:
        def build() -> Run:
            y_TV = read(*reads[:3])

            def run() -> tuple[Tensor, ...]:
                table_grad, weights_grad = torch.autograd.grad(y_TV, inputs, reads.upstream_TV, retain_graph=True)
                return table_grad.coalesce() if coalesce else table_grad, weights_grad

            return run

        return Way(name, build)

    # The package's training never builds the whole gradient: it updates the touched rows from this.
    def touched() -> tuple[Tensor, ...]:
        with torch.no_grad():
            segments = read_segments(reads.ids_TK.flatten(), sizes.rows)
            source_L = read_sources(reads.ids_TK).flatten()
            rows_grad_UV = row_gradients(segments, reads.weights_TK.flatten(), source_L, reads.upstream_TV)
            return rows_grad_UV, gathered_dot(reads.table_NV, reads.upstream_TV, reads.ids_TK), segments.rows_U

    def error(run: Run) -> float:
        table_grad, weights_grad, *rows_U = run()
        # Three forms of the table's gradient: touched rows, a sparse tensor, a dense one.
        if rows_U:
            result_RV = table_grad[torch.isin(rows_U[0].long(), reads.rows_R)]
        elif table_grad.is_sparse:
            result_RV = table_grad.coalesce().index_select(0, reads.rows_R).to_dense()
        else:
            result_RV = table_grad[reads.rows_R]
        return relative_error([result_RV, weights_grad[reads.tokens_R]], expected())

    peers = [
        way("embedding_bag", bag),
        way("embedding_bag sparse", functools.partial(bag, sparse=True)),
        way("embedding_bag sparse, coalesced", functools.partial(bag, sparse=True), coalesce=True),
        way("gather + einsum", gather_einsum),
    ]
    # Rows are read for the weights' gradient and added to for their own, which also has to be zeroed once.
    gathered = sizes.tokens * sizes.reads * sizes.dim * dtype.itemsize
    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[
            *peers,
            way("auto", weighted_gather),
            way("eager", functools.partial(weighted_gather, backend="eager")),
            Way("auto, touched rows only", lambda: touched),
        ],
        error=error,
        tolerance=TOLERANCE[dtype],
        baselines=["embedding_bag", "gather + einsum"],
        peers=[peer.name for peer in peers],
        moved=2 * gathered + sizes.rows * sizes.dim * dtype.itemsize,
        memory=memory,
    )


def dot_case(sizes: Lookup, device: torch.device, dtype: torch.dtype, backward: bool) -> Case:
    """Builds the case: inner products of tokens with their rows, and with `backward` the gradients of both."""
    reads = Reads.draw(sizes, dtype, device)
    inputs = reads.table_NV.requires_grad_(backward), reads.upstream_TV.requires_grad_(backward)

    def way(name: str, dot: Callable[..., Tensor]) -> Way:
        def run() -> tuple[Tensor, ...]:
            dots_TK = dot(*inputs, reads.ids_TK)
            return dots_TK.detach(), *(torch.autograd.grad(dots_TK, inputs, reads.weights_TK) if backward else ())

        return Way(name, lambda: run)

    @functools.cache
    @torch.no_grad()
    def expected() -> list[Tensor]:
        # With the weights as upstream gradient, both operations have the same gradient per row, and a token's gradient
        # is the weighted sum of its rows.
        return [reads.dots(), *((reads.row_gradients(), reads.sums()) if backward else ())]

    def error(run: Run) -> float:
        dots_TK, *gradients = run()
        results = [dots_TK[reads.tokens_R]]
        if gradients:
            results += [gradients[0][reads.rows_R], gradients[1][reads.tokens_R]]
        return relative_error(results, expected())

    gathered = sizes.tokens * sizes.reads * sizes.dim * dtype.itemsize
    return Case(
        sizes=f"{sizes} {dtype}".replace("torch.", ""),
        ways=[
            way("gather + einsum", gather_einsum_dot),
            way("auto", gathered_dot),
            way("eager", functools.partial(gathered_dot, backend="eager")),
        ],
        error=error,
        tolerance=TOLERANCE[dtype],
        baselines=["gather + einsum"],
        peers=["gather + einsum"],
        moved=3 * gathered + sizes.rows * sizes.dim * dtype.itemsize if backward else gathered,
    )


class Plan(NamedTuple):
    """Sizes for one kind of device."""

    retrievals: Sequence[Retrieval]
    lookups: Sequence[Lookup]
    dots: Sequence[Lookup]


SMOKE = Plan(
    [Retrieval(16, 2, 16, 8, 4)],
    [Lookup(16, 8, 256, 16, "uniform"), Lookup(16, 8, 256, 16, "zipf")],
    [Lookup(16, 8, 256, 16, "uniform")],
)
CPU = Plan(
    [Retrieval(4096, 4, 1024, 64, 32)],
    [
        Lookup(4096, 128, 2**18, 256, "uniform"),
        Lookup(4096, 128, 2**18, 256, "zipf"),
        Lookup(1024, 128, 2**20, 256, "uniform"),
    ],
    [Lookup(1024, 128, 2**18, 256, "uniform")],
)
GPU = Plan(
    [Retrieval(tokens, 4, n_keys, 256, 32) for tokens in (16384, 4096) for n_keys in (1024, 4096)],
    [
        Lookup(16384, 128, 2**20, 1024, "uniform"),
        Lookup(16384, 128, 2**24, 1024, "uniform"),
        Lookup(16384, 128, 2**18, 1024, "uniform"),
        Lookup(16384, 128, 2**20, 1024, "zipf"),
        Lookup(16384, 128, 2**20, 1536, "uniform"),
        Lookup(4096, 128, 2**22, 1024, "uniform"),
    ],
    [Lookup(16384, 128, 2**20, 1024, "uniform")],
)


def plan(options: Options) -> Iterator[Row]:
    """Yields the rows in the order of a forward pass."""
    # On a GPU models train in bf16.
    device, dtype = options.device, torch.bfloat16 if options.device.type == "cuda" else torch.float32
    sizes = SMOKE if options.smoke else GPU if device.type == "cuda" else CPU

    def row(name: str, make: Callable[..., Case], full: Retrieval | Lookup, *rest: object) -> Row:
        tiny = SMOKE.retrievals[0] if isinstance(full, Retrieval) else SMOKE.lookups[0]
        make_full, make_tiny = (functools.partial(make, one, device, *rest) for one in (full, tiny))
        return Row(name, make_full, make_tiny, sizes=str(full))

    for retrieval in sizes.retrievals:
        yield row("R1 combine", combine_case, retrieval)
        yield row("R1 retrieval, forward", retrieval_case, retrieval, False)
        yield row("R1 retrieval, forward + backward", retrieval_case, retrieval, True)
    for name, case in (("R2 lookup, forward", lookup_case), ("R3 lookup, backward", lookup_backward_case)):
        for lookup in sizes.lookups:
            # On the CPU each memory measurement needs a process of its own: one size is enough.
            yield row(name, case, lookup, dtype, device.type == "cuda" or lookup is sizes.lookups[0])
    for lookup in sizes.dots:
        yield row("dot, forward", dot_case, lookup, dtype, False)
        yield row("dot, forward + backward", dot_case, lookup, dtype, True)
    for name, layer in (("layer, PKM", pkm_layer), ("layer, PEER", peer_layer)):
        yield Row(name, functools.partial(layer, options.smoke, device), functools.partial(layer, True, device))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the plan of the device."""
    benchmark("ops", __doc__, plan, arguments)


if __name__ == "__main__":
    main()
