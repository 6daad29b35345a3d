"""What TensorBoard is shown: a square of slots, a curve, and the tokens behind the busiest slots."""

from __future__ import annotations

import pytest
import torch
from toys import Letters

from pkm_lightning.callbacks.slot_panels import heat_map, most_read, rank_frequency


def test_a_pixel_is_a_pair_of_sub_keys_and_black_where_nobody_reads() -> None:
    counts_N = torch.zeros(9, dtype=torch.int64)
    counts_N[5], counts_N[7] = 1, 1000
    image = heat_map(counts_N)
    assert image.shape == (3, 3, 3)
    assert (image.sum(0) > 0).nonzero().tolist() == [[1, 2], [2, 1]]
    assert image[:, 2, 1].sum() > image[:, 1, 2].sum()


@pytest.mark.parametrize(("n_slots", "side"), [(1, 1), (5, 3), (1024**2, 1024), (1025**2, 513), (3000**2, 1000)])
def test_large_squares_are_sums_of_blocks(n_slots: int, side: int) -> None:
    counts_N = torch.zeros(n_slots, dtype=torch.int64)
    counts_N[-1] = 3
    image = heat_map(counts_N)
    assert image.shape == (3, side, side)
    assert int((image.sum(0) > 0).sum()) == 1
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1


def curve(image: torch.Tensor) -> list[int]:
    """Returns the line of the lowest blue pixel in each column, -1 if there is none."""
    is_blue_YX = image[2] > image[0] + 0.3
    return [int(column.nonzero().max()) if column.any() else -1 for column in is_blue_YX.T]


def test_a_power_law_is_a_straight_line_and_even_use_a_flat_one() -> None:
    falling = curve(rank_frequency((1e6 / torch.arange(1, 1001)).long()))
    steps = [falling[x] - falling[0] for x in (90, 180, 270, 359)]
    assert steps == sorted(steps)
    assert steps[1] == pytest.approx(steps[3] / 2, abs=2)
    assert len(set(curve(rank_frequency(torch.full((500,), 7))))) == 1


@pytest.mark.parametrize("counts", [[0, 0, 0], [5], [1, 0], [0, 9, 0, 1]])
def test_few_or_no_reads_are_drawn_too(counts: list[int]) -> None:
    image = rank_frequency(torch.tensor(counts))
    assert torch.isfinite(image).all()
    assert (max(curve(image)) >= 0) is any(counts)


def test_the_busiest_slots_are_named_with_the_tokens_that_read_them() -> None:
    counts_N = torch.tensor([0, 30, 10, 0])
    ids_TK = torch.tensor([[1, 1], [1, 2], [2, 3]])
    tokens_T = torch.tensor([2, 3, 3])  # a b b
    lines = most_read(counts_N, ids_TK, tokens_T, Letters()).splitlines()
    assert lines[2:] == ["| 1 | 30 | 75.00% | `a` (2), `b` (1) |", "| 2 | 10 | 25.00% | `b` (2) |"]
    assert "| 3 (2) |" in most_read(counts_N, ids_TK, tokens_T, None)


def test_a_token_that_the_tokenizer_does_not_know_is_its_number() -> None:
    class Small:
        def decode(self, ids: list[int]) -> str:
            return ["a", "b"][ids[0]]

    lines = most_read(torch.tensor([2, 0]), torch.tensor([[0], [0]]), torch.tensor([1, 9]), Small()).splitlines()
    assert lines[2:] == ["| 0 | 2 | 100.00% | `b` (1), 9 (1) |"]
