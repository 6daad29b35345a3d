"""The panels of slot usage: a square of slots with a colour scale, a curve, the tokens behind the most-read slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm
from toys import Letters

from pkm_lightning.callbacks.slot_panels import heat_map, most_read, pixels, rank_frequency, square


def test_a_cell_is_a_pair_of_sub_keys() -> None:
    counts_N = torch.zeros(9, dtype=torch.int64)
    counts_N[5], counts_N[7] = 1, 1000
    assert square(counts_N).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1000, 0]]


@pytest.mark.parametrize(("n_slots", "side"), [(1, 1), (5, 3), (1024**2, 1024), (1025**2, 513), (3000**2, 1000)])
def test_large_squares_are_sums_of_blocks(n_slots: int, side: int) -> None:
    counts_N = torch.zeros(n_slots, dtype=torch.int64)
    counts_N[-1] = 3
    reads_CC = square(counts_N)
    assert reads_CC.shape == (side, side)
    assert (int((reads_CC > 0).sum()), float(reads_CC.sum())) == (1, 3)


@pytest.mark.parametrize(("n_keys", "label"), [(3, "sub-key of the first half"), (None, "slot, divided by 3")])
def test_the_heat_map_has_axes_a_title_and_a_colour_scale(n_keys: int | None, label: str) -> None:
    counts_N = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1000, 0])
    axes, scale = heat_map(counts_N, "layer3.slot, 9 slots, step 1,200", n_keys).axes
    assert axes.get_ylabel() == label
    assert axes.get_xlabel()
    assert "layer3.slot, 9 slots, step 1,200" in axes.get_title()
    assert "never read" in scale.get_ylabel()
    (image,) = axes.images
    shown: Any = image.get_array()
    assert shown.mask.tolist() == [[True, True, True], [True, True, False], [True, False, True]]
    assert axes.get_facecolor()[:3] == (0, 0, 0)
    assert isinstance(image.norm, LogNorm)
    assert (image.norm.vmin, image.norm.vmax) == (1, 1000)
    assert tuple(image.get_extent()) == (0, 3, 3, 0)


def test_a_power_law_is_a_straight_line_that_names_its_axes() -> None:
    (axes,) = rank_frequency((1e6 / torch.arange(1, 1001)).long(), "table0").axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank of the slot", "reads since the start")
    ranks, reads = (np.asarray(data, float) for data in axes.lines[0].get_data())
    assert (ranks[0], ranks[-1]) == (1, 1000)
    assert reads * ranks == pytest.approx(np.full(len(ranks), 1e6), rel=1e-3)


@pytest.mark.parametrize("counts", [[0, 0, 0], [5], [1, 0], [0, 9, 0, 1]])
def test_few_or_no_reads_are_drawn_too(counts: list[int]) -> None:
    counts_N = torch.tensor(counts)
    curve = rank_frequency(counts_N, "")
    assert len(curve.axes[0].lines[0].get_xdata()) == sum(count > 0 for count in counts)
    for figure in (curve, heat_map(counts_N, "", None)):
        image = pixels(figure)
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.min() == 0


def test_the_busiest_slots_are_named_with_the_tokens_that_read_them() -> None:
    counts_N = torch.tensor([0, 30, 10, 0])
    ids_TK = torch.tensor([[1, 1], [1, 2], [2, 3]])
    tokens_T = torch.tensor([2, 3, 3])  # a b b
    rows = most_read(counts_N, ids_TK, tokens_T, Letters())
    assert rows == [("1", "30", "75.00%", "`a` (2), `b` (1)"), ("2", "10", "25.00%", "`b` (2)")]
    assert most_read(counts_N, ids_TK, tokens_T, None)[1][3] == "3 (2)"


def test_a_token_that_the_tokenizer_does_not_know_is_its_number() -> None:
    class Small:
        def decode(self, ids: list[int]) -> str:
            return ["a", "b"][ids[0]]

    rows = most_read(torch.tensor([2, 0]), torch.tensor([[0], [0]]), torch.tensor([1, 9]), Small())
    assert rows == [("0", "2", "100.00%", "`b` (1), 9 (1)")]
