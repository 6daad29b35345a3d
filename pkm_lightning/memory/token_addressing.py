"""Addressing by tokens: rows whose numbers follow from the last few token ids, by hashing (n-grams).

The ids are known before the forward, since no hidden state enters them.

Letters: W vocabulary, M tokens of the largest order, P = M - 1 + T tokens with those in front, O orders, K = O * H
reads per token, for H heads per order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_integer

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64

#: The most rows that int32 ids can number, in which ids travel between ranks.
_MOST_ROWS = 2**31 - 1
#: The longest n-gram: each of its tokens takes a step of the forward.
_LONGEST_ORDER = 64
#: Constants of the multipliers: those of SplitMix64, and the distance between the seeds of consecutive tables.
_WORD, _GAMMA, _MIX_1, _MIX_2 = 2**64, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SEED_STRIDE = 10_007


class NGramAddressing(nn.Module):
    """Hashes of the last n tokens, each head of each order with a range of rows of its own.

    Section 2 of Engram (Cheng et al. 2026, arXiv 2601.07372), with the multipliers and primes of Qwen's layer:

        mix_n = c(x_t) m_0 XOR c(x_{t-1}) m_1 XOR ... XOR c(x_{t-n+1}) m_{n-1}        (int64, wrapping)
        id    = mix_n mod p_{n,h} + offset_{n,h}

    Tokens before the document count as the end-of-text token, and so do those before the last end-of-text token: ids
    do not depend on what is packed in front of a document.

    | paper | here |
    |---|---|
    | x, the canonical id c(x) | `tokens_BP`, `canonical_ids` |
    | m_i, odd | `multipliers`, (M,) |
    | p_{n,h}, primes | `head_sizes`, (K,), by order and then by head |
    | offset_{n,h} | `head_offsets`, (K,) |

    All four and `end_id` are buffers, since learned rows mean nothing without the addresses that they were learned
    under.

    Args:
        vocab_size: vocabulary W.
        orders: lengths n of the n-grams, each 2 to 64.
        heads: heads per order H.
        rows: base size of a head's range; see `head_sizes`.
        table_number: number of the table among those of the model.
        seed: decides the multipliers.
        end_id: the end-of-text token, 0 to W - 1.

    Raises:
        ConfigError: a value out of range, a repeated order, or more rows than int32 can number.
    """

    multipliers: Tensor
    head_sizes: Tensor
    head_offsets: Tensor
    end_id: Tensor
    canonical_ids: Tensor

    def __init__(
        self,
        *,
        vocab_size: int,
        orders: Sequence[int],
        heads: int,
        rows: int,
        table_number: int,
        seed: int,
        end_id: int,
    ) -> None:
        super().__init__()
        check_integer("ffn.seed", seed, low=0)
        check_integer("ffn.end_id", end_id, low=0, high=vocab_size - 1)
        self.orders, self.heads = checked_orders(orders), heads
        self._sizes = head_sizes(reads_per_token(orders, heads), rows, table_number)
        self._multipliers = hash_multipliers(max(self.orders), vocab_size, seed, table_number)
        self._initial_end_id = end_id
        self.register_buffer("multipliers", torch.empty(len(self._multipliers), dtype=torch.int64))
        self.register_buffer("head_sizes", torch.empty(len(self._sizes), dtype=torch.int64))
        self.register_buffer("head_offsets", torch.empty(len(self._sizes), dtype=torch.int64))
        self.register_buffer("end_id", torch.empty((), dtype=torch.int64))
        self.register_buffer("canonical_ids", torch.empty(vocab_size, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the buffers from the constructor's arguments; every token is its own canonical token."""
        sizes_K = torch.tensor(self._sizes)
        self.multipliers.copy_(torch.tensor(self._multipliers))
        self.head_sizes.copy_(sizes_K)
        self.head_offsets.copy_(sizes_K.cumsum(0) - sizes_K)
        self.end_id.fill_(self._initial_end_id)
        self.canonical_ids.copy_(torch.arange(len(self.canonical_ids)))

    @property
    def context(self) -> int:
        """Tokens in front of a token that its ids depend on, M - 1."""
        return len(self._multipliers) - 1

    @property
    def reads(self) -> int:
        """Rows that each token reads, K."""
        return len(self._sizes)

    @property
    def readable_rows(self) -> int:
        """Rows of all heads; a table may have more behind them."""
        if self.head_sizes.is_meta:
            return sum(self._sizes)
        # Weights from files may bring other sizes.
        return int((self.head_offsets + self.head_sizes).max())

    def forward(
        self, tokens_BP: Int64[Tensor, "B P"], doc_ids_BT: Int64[Tensor, "B T"] | None = None
    ) -> Int32[Tensor, "B T K"]:
        """Returns the rows that each of the last T tokens reads.

        Args:
            tokens_BP: `context` tokens in front, then T tokens; below 0 where there is no token.
            doc_ids_BT: document number of each of the T tokens, whose predecessors are then in `tokens_BP` too; None
                for one document.
        """
        context = self.context
        length = tokens_BP.shape[1] - context
        tokens_BP = torch.where(tokens_BP < 0, self.end_id, tokens_BP)
        docs_BP = None if doc_ids_BT is None else nn.functional.pad(doc_ids_BT, (context, 0))
        token_BT = tokens_BP[:, context:]
        mix_BT = self.canonical_ids[token_BT] * self.multipliers[0]
        mixes = []
        for distance in range(1, context + 1):
            window, later_BT = slice(context - distance, context - distance + length), token_BT
            token_BT = tokens_BP[:, window]
            # In front of an end-of-text token there are only end-of-text tokens; the last token itself may be one.
            if distance > 1:
                token_BT = torch.where(later_BT == self.end_id, self.end_id, token_BT)
            if docs_BP is not None and doc_ids_BT is not None:
                token_BT = torch.where(docs_BP[:, window] == doc_ids_BT, token_BT, self.end_id)
            mix_BT = mix_BT ^ (self.canonical_ids[token_BT] * self.multipliers[distance])
            if distance + 1 in self.orders:
                mixes.append(mix_BT)
        mixes_BTO1 = torch.stack(mixes, -1).unsqueeze(-1)
        # The remainder has the sign of the divisor, also for a product that has wrapped to a negative number.
        ids_BTOH = mixes_BTO1 % self.head_sizes.view(-1, self.heads) + self.head_offsets.view(-1, self.heads)
        return ids_BTOH.flatten(2).int()


def checked_orders(orders: Sequence[int]) -> tuple[int, ...]:
    """Returns `orders`, ascending.

    Raises:
        ConfigError: none, a repeated one, or one out of range.
    """
    for order in orders:
        check_integer(f"ffn.orders={list(orders)}: order", order, low=2, high=_LONGEST_ORDER)
    if not orders or len(set(orders)) != len(orders):
        raise ConfigError(f"ffn.orders={list(orders)} must list one or more lengths, each once, as in [2, 3].")
    return tuple(sorted(orders))


def reads_per_token(orders: Sequence[int], heads: int) -> int:
    """Returns the heads of all orders, each of which reads one row per token.

    Raises:
        ConfigError: as `checked_orders`; fewer than one head.
    """
    check_integer("ffn.heads", heads, low=1)
    return len(checked_orders(orders)) * heads


def head_sizes(n_heads: int, rows: int, table_number: int) -> tuple[int, ...]:
    """Returns the rows of each head: distinct primes from `rows` on, over all tables of the model.

    Head j of table t has the (t * n_heads + j + 1)-th prime after rows - 1. Distinct primes make it unlikely that two
    n-grams share their rows in several heads. With `rows=1` each head has a single row, which every n-gram reads.

    Raises:
        ConfigError: `rows` between 1 and the number of heads, whose primes would be many times larger than `rows`, or
            more rows than int32 can number.
    """
    check_integer("ffn.rows", rows, low=1)
    if rows == 1:
        return (1,) * n_heads
    if rows < n_heads:
        raise ConfigError(
            f"ffn.rows={rows} is too few for the distinct primes of {n_heads} heads (ffn.heads per order); allowed: "
            f"{n_heads} or more, or 1 for a single row per head."
        )
    if rows * n_heads <= _MOST_ROWS:
        sizes = _primes(rows, n_heads, table_number)
        if sum(sizes) <= _MOST_ROWS:
            return sizes
    raise ConfigError(
        f"ffn.rows={rows} for {n_heads} heads are more than {_MOST_ROWS:,} rows, which int32 ids cannot number; lower "
        "ffn.rows or ffn.heads."
    )


@functools.cache
def _primes(rows: int, n_heads: int, table_number: int) -> tuple[int, ...]:
    # Here, since importing it takes a fifth of a second, which models without such a table need not pay.
    from sympy import nextprime

    primes = [nextprime(rows - 1)]
    while len(primes) < (table_number + 1) * n_heads:
        primes.append(nextprime(primes[-1]))
    return tuple(map(int, primes[-n_heads:]))


def padded_rows(sizes: Sequence[int], multiple: int) -> int:
    """Returns the rows of a table for heads of these sizes, rounded up to a multiple.

    Raises:
        ConfigError: a multiple below 1, or one that makes more rows than int32 can number.
    """
    check_integer("ffn.row_multiple", multiple, low=1)
    total = -(-sum(sizes) // multiple) * multiple
    check_integer(f"ffn.row_multiple={multiple} makes the rows of the table", total, high=_MOST_ROWS)
    return total


def hash_multipliers(count: int, vocab_size: int, seed: int, table_number: int) -> tuple[int, ...]:
    """Returns odd multipliers, whose products with token ids do not wrap."""
    bound = max(1, (2**63 - 1) // max(vocab_size, 1) // 2)
    states = [seed + SEED_STRIDE * table_number + _GAMMA * (i + 1) for i in range(count)]
    return tuple(2 * (_splitmix64(state) % bound) + 1 for state in states)


def _splitmix64(state: int) -> int:
    """Returns the output of the generator SplitMix64 (Steele, Lea & Flood 2014) after `state`."""
    mixed = (state + _GAMMA) % _WORD
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1 % _WORD
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2 % _WORD
    return mixed ^ (mixed >> 31)
