"""Row ids of n-grams equal a computation in Python's integers; primes, multipliers and refusals.

Letters: W vocabulary.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory.plain_ngrams import plain_ids
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory.token_addressing import NGramAddressing, hash_multipliers, head_sizes, padded_rows

MOST = 2**31 - 1


def addressing(**changes: Any) -> NGramAddressing:
    sizes = {"vocab_size": 50, "orders": [2, 3], "heads": 2, "rows": 30, "table_number": 0, "seed": 7, "end_id": 0}
    return NGramAddressing(**{**sizes, **changes})


@st.composite
def cases(draw: st.DrawFn) -> tuple[NGramAddressing, Tensor, Tensor | None]:
    """Draws an addressing, the tokens of some sequences (-1 for padding), and their documents."""
    W = draw(st.sampled_from([2, 7, 50, 250_000]))
    orders = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3, unique=True))
    heads = draw(st.integers(1, 3))
    reads = heads * len(orders)
    part = addressing(
        vocab_size=W,
        orders=orders,
        heads=heads,
        rows=draw(st.sampled_from([1, reads, 30, 1000])),
        table_number=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**63)),
        end_id=draw(st.integers(0, W - 1)),
    )
    drawn = random.Random(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        part.canonical_ids.copy_(torch.tensor([drawn.randrange(W) for _ in range(W)]))
    if draw(st.booleans()):  # products that wrap
        part.multipliers.copy_(torch.tensor([drawn.randrange(-(2**62), 2**62) * 2 + 1 for _ in part.multipliers]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    # Few different tokens besides the highest, so that the end token is often among them.
    usual = [int(part.end_id), W - 1, drawn.randrange(W), *([-1] if draw(st.booleans()) else [])]
    tokens_BT = torch.tensor([[drawn.choice(usual) for _ in range(length)] for _ in range(batch)])
    docs = [list(itertools.accumulate(drawn.choice([0, 0, 1]) for _ in range(length))) for _ in range(batch)]
    return part, tokens_BT, torch.tensor(docs) if draw(st.booleans()) else None


@given(cases())
def test_ids_equal_plain_integers(case: tuple[NGramAddressing, Tensor, Tensor | None]) -> None:
    part, tokens_BT, doc_ids_BT = case
    tokens_BP = torch.nn.functional.pad(tokens_BT, (part.context, 0), value=-1)
    ids_BTK = part(tokens_BP, doc_ids_BT)
    assert ids_BTK.dtype is torch.int32
    docs_BT = torch.zeros_like(tokens_BT) if doc_ids_BT is None else doc_ids_BT
    expected = [plain_ids(part, *pair) for pair in zip(tokens_BT.tolist(), docs_BT.tolist(), strict=True)]
    assert ids_BTK.tolist() == expected


def test_tokens_in_front_continue_the_sequence() -> None:
    part, tokens_BT = addressing(), torch.randint(50, (3, 11))
    padded_BP = torch.nn.functional.pad(tokens_BT, (part.context, 0), value=-1)
    for end in range(5, 11):
        later_BTK = part(padded_BP[:, end - 3 : end + part.context])
        assert torch.equal(later_BTK, part(padded_BP)[:, end - 3 : end])


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@pytest.mark.parametrize("rows", [4, 30, 1000, 20_000_000])
def test_heads_of_all_tables_have_the_next_distinct_primes(rows: int) -> None:
    sizes = [size for table in range(3) for size in head_sizes(4, rows, table)]
    candidates = itertools.count(rows)
    assert sizes == [next(n for n in candidates if is_prime(n)) for _ in range(12)]


def test_heads_have_ranges_of_their_own() -> None:
    part = addressing(heads=3)
    starts = part.head_offsets.tolist()
    ends = [start + size for start, size in zip(starts, part.head_sizes.tolist(), strict=True)]
    assert starts == [0, *ends[:-1]]
    ids_BTK = part(torch.randint(50, (20, 60)))
    assert [int(i) for i in ids_BTK.amax((0, 1))] == [end - 1 for end in ends], "every range is used to its end"
    assert [int(i) for i in ids_BTK.amin((0, 1))] == starts
    assert padded_rows(part.head_sizes.tolist(), 128) % 128 == 0
    assert 0 <= padded_rows(part.head_sizes.tolist(), 128) - ends[-1] < 128


@pytest.mark.parametrize("vocab_size", [2, 50, 250_000])
def test_multipliers_are_odd_and_products_do_not_wrap(vocab_size: int) -> None:
    per_table = [hash_multipliers(5, vocab_size, 3, table) for table in range(3)]
    flat = list(itertools.chain(*per_table))
    assert len(set(flat)) == 15
    assert all(m % 2 == 1 and 0 < m * (vocab_size - 1) < 2**63 for m in flat)
    assert hash_multipliers(2, vocab_size, 3, 1) == per_table[1][:2]
    assert hash_multipliers(5, vocab_size, 4, 0) != per_table[0]


def test_one_row_per_head_holds_every_n_gram() -> None:
    ids_BTK = addressing(rows=1)(torch.randint(50, (2, 9)))
    assert torch.equal(ids_BTK, torch.arange(4, dtype=torch.int32).expand_as(ids_BTK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": [1, 2]}, r"^ffn.orders=\[1, 2\]: order=1 is out of range; allowed: 2 to 64.$"),
        ({"orders": [2, 2]}, r"^ffn.orders=\[2, 2\] must list one or more lengths, each once, as in \[2, 3\].$"),
        ({"orders": []}, r"^ffn.orders=\[\] must list one or more lengths"),
        ({"orders": [2.5]}, r"^ffn.orders=\[2.5\]: order=2.5 is not a whole number.$"),
        ({"heads": 0}, r"^ffn.heads=0 is out of range"),
        ({"rows": 0}, r"^ffn.rows=0 is out of range"),
        ({"rows": 3}, r"^ffn.rows=3 is too few for the distinct primes of 4 heads .*; allowed: 4 or more, or 1 for"),
        ({"rows": 2**30}, r"^ffn.rows=1073741824 for 4 heads are more than 2,147,483,647 rows"),
        ({"rows": MOST // 4}, r"^ffn.rows=536870911 for 4 heads are more than 2,147,483,647 rows"),
        ({"seed": -1}, r"^ffn.seed=-1 is out of range"),
        ({"end_id": 50}, r"^ffn.end_id=50 is out of range; allowed: 0 to 49.$"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        addressing(**changes)


@pytest.mark.parametrize("multiple", [0, 2**40])
def test_wrong_multiples_are_refused(multiple: int) -> None:
    with pytest.raises(ConfigError, match="row_multiple"):
        padded_rows([7, 11], multiple)
