"""Peak memory of PEER's expert computation, forward and backward, and of gather-and-einsum, at T = 4096, H * K = 128.

Each way runs in a process of its own; its cost is the peak of resident memory above that of inputs and gradients.
`python scripts/bench_peer_memory.py [--tokens 4096] [--dim 256] [--reads 128]`
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
import time

import torch
from benchmarks.memory import reset_peak, resident_memory
from torch.nn import functional

from pkm_lightning.ops import gathered_dot, weighted_gather

WAYS = ("rows", "gather_einsum")


def one_way(way: str, tokens: int, dim: int, reads: int, rows: int) -> None:
    """Runs one way; prints peak resident memory above the start in bytes, seconds of the second pass, and the norm."""
    torch.manual_seed(0)
    down, up = (torch.randn(rows, dim).div_(dim**0.5).requires_grad_() for _ in range(2))
    x = torch.randn(tokens, dim, requires_grad=True)
    ids = torch.randint(rows, (tokens, reads), dtype=torch.int32)
    weights = torch.rand(tokens, reads).requires_grad_()
    upstream = torch.randn(tokens, dim)
    # Every way holds the gradients of the inputs: they exist before the measurement starts.
    for value in (down, up, x, weights):
        value.grad = torch.zeros_like(value)
    before = resident_memory("VmRSS")
    reset_peak()
    # The second pass is timed: the first compiles kernels and touches pages for the first time.
    for _ in range(2):
        start = time.perf_counter()
        if way == "rows":
            hidden = functional.gelu(gathered_dot(down, x, ids))
            y = weighted_gather(up, ids, weights * hidden)
        else:
            long = ids.long()
            hidden = functional.gelu(torch.einsum("td,tkd->tk", x, down[long]))
            y = torch.einsum("tk,tkd->td", weights * hidden, up[long])
        y.backward(upstream)
        seconds = time.perf_counter() - start
    print(resident_memory("VmHWM") - before, seconds, y.detach().norm().item())


def main() -> None:
    """Runs both ways in `--rounds` processes each and prints a table of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--reads", type=int, default=128, help="heads * knn")
    parser.add_argument("--rows", type=int, default=128**2, help="experts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="run one way in this process")
    options = parser.parse_args()
    sizes = [options.tokens, options.dim, options.reads, options.rows]
    if options.way:
        one_way(options.way, *sizes)
        return
    named = zip(("tokens", "dim", "reads", "rows"), sizes, strict=True)
    flags = [part for name, size in named for part in (f"--{name}", str(size))]
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    norms: dict[str, float] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, *flags]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks[way].append(float(shown[0]))
            times[way].append(float(shown[1]))
            norms[way] = float(shown[2])
    # Both ways must compute the same, or the comparison means nothing.
    if abs(norms["rows"] - norms["gather_einsum"]) > 1e-3 * norms["rows"]:
        raise RuntimeError(f"the two ways disagree: {norms}")
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, fp32, "
        + " ".join(flags)
    )
    print("| way | peak above inputs and gradients, MiB | forward + backward, s | peak / gather_einsum |")
    print("|---|---|---|---|")
    base = statistics.median(peaks["gather_einsum"])
    for way in WAYS:
        peak = statistics.median(peaks[way])
        print(f"| {way} | {peak / 2**20:,.0f} | {statistics.median(times[way]):.2f} | {peak / base:.3f} |")


if __name__ == "__main__":
    main()
