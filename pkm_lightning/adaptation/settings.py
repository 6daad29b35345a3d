"""How facts are written: the keys of `edit`, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pkm_lightning.errors import check_flag, check_integer, check_range


@dataclass(frozen=True, kw_only=True)
class WritingSettings:
    """How facts are written; `configs/edit.yaml` explains each.

    Args:
        rows_per_fact: most rows that the prompts of one fact may move, over all tables.
        kl_bound: largest mean KL(before || after) on other text, in nats per token.
        margin: by how many logits each answer token must lead before the learning ends.
        max_steps: optimizer steps, at most.
        max_seconds: of the learning, at most.
        lr: step per value and update, as a share of the typical size of a value of the rows.
        batch_size: prompts per step.
        drift_tokens: tokens of other text that are read in each of its two parts, at most.
        contexts: share of the prompts that are learned behind a piece of other text.
        ends: whether the end token is learned behind each answer.
        seed: of all draws.

    Raises:
        ConfigError: a value is out of range.
    """

    rows_per_fact: int = 64
    kl_bound: float = 0.0033
    margin: float = 1.0
    max_steps: int = 300
    max_seconds: float = 120.0
    lr: float = 0.02
    batch_size: int = 64
    drift_tokens: int = 65536
    contexts: float = 0.0
    ends: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows_per_fact", "max_steps", "batch_size"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("drift_tokens", self.drift_tokens, low=16)
        check_integer("seed", self.seed, low=0)
        check_range("kl_bound", self.kl_bound, 1e-9)
        check_range("margin", self.margin, 0)
        check_range("max_seconds", self.max_seconds, 0.01)
        check_range("lr", self.lr, 1e-9)
        check_range("contexts", self.contexts, 0, 1)
        check_flag("ends", self.ends)

    def record(self) -> dict[str, Any]:
        """Returns the values by name."""
        return asdict(self)
