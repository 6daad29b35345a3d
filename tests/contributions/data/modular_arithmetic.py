"""`data=modular_arithmetic`: sums modulo a number as text, some of which training never shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Unpack

import numpy as np

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.cache import CacheKey, Source
from pkm_lightning.data.datamodule import Splits, TokenDataModule, TokenOptions
from pkm_lightning.data.packing import PackedOrder, pack
from pkm_lightning.data.statements import StatementSequences, StatementStore, write_statements
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.errors import check_range

__all__ = ["ModularArithmetic"]


class ModularArithmetic(TokenDataModule):
    """Documents such as `3 + 4 =` with the answer `2`, packed into sequences; the loss is on the answer.

    Args:
        modulus: sums are taken modulo this number, 2 or more.
        val_fraction: share of the sums that is held out for validation, above 0, below 1.
        seed: decides which sums are held out.
        options: see `TokenOptions`.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(self, *, modulus: int, val_fraction: float, seed: int, **options: Unpack[TokenOptions]) -> None:
        super().__init__(**options)
        check_range("data.modulus", modulus, low=2)
        check_range("data.val_fraction", val_fraction, low=0.01, high=0.9)
        check_range("data.seed", seed, low=0)
        self.modulus, self.val_fraction, self.seed = modulus, val_fraction, seed

    def cache_key(self) -> CacheKey:
        """Returns modulus, split and tokenizer."""
        arguments = {
            "modulus": self.modulus,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "tokenizer": self.tokenizer_choice.identity(),
        }
        return CacheKey("modular_arithmetic", arguments)

    def build(self, folder: Path) -> list[Source]:
        """Writes all sums, those of validation last."""
        sums = self.sums()
        tokenizer = self.tokenizer_choice.make(lambda: (f"{prompt} {answer}" for prompt, answer in sums))
        tokenizer.save(folder / "tokenizer.json")
        prompts = tokenizer.encode_batch([prompt for prompt, _ in sums])
        answers = tokenizer.encode_batch([f" {answer}" for _, answer in sums])
        tokens = ([*prompt, *answer, tokenizer.eos_id] for prompt, answer in zip(prompts, answers, strict=True))
        write_statements(folder, tokens, (len(prompt) for prompt in prompts), tokenizer.vocab_size)
        return [Source("sums", files={})]

    def load(self, folder: Path) -> Splits:
        """Opens the sums."""
        store = StatementStore(folder)
        store.require_fit(self.seq_len)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        sequences = StatementSequences(store, width=self.seq_len, answer_only=True, pad_id=tokenizer.pad_id)
        train, validation = np.split(np.arange(len(store.lengths)), [self.n_facts])
        return Splits(
            tokenizer=tokenizer,
            train=sequences,
            order=PackedOrder(train, store.lengths, capacity=self.seq_len, seed=self.order_seed),
            validation=sequences,
            validation_keys=pack(validation, store.lengths, self.seq_len),
        )

    def sums(self) -> list[tuple[str, str]]:
        """Returns prompt and answer of every sum, those of validation last."""
        m = self.modulus
        sums = [(f"{a} + {b} =", str((a + b) % m)) for a in range(m) for b in range(m)]
        return [sums[i] for i in np.random.default_rng(self.seed).permutation(m * m)]

    @property
    def n_facts(self) -> int:
        """Sums that training shows."""
        return self.modulus**2 - max(1, round(self.modulus**2 * self.val_fraction))

    def recall_items(self, limit: int | None = None) -> list[RecallItem]:
        """Returns at most `limit` of the sums that training never shows."""
        return [
            RecallItem(prompt, answer, (), "sum", "validation", 0, 0, math.log2(self.modulus), False)
            for prompt, answer in self.sums()[self.n_facts :][:limit]
        ]
