"""The choice of the next token from logits: greedy, or drawn from a distribution that is cut and sharpened.

Letters: W vocabulary, P tokens so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pkm_lightning.errors import ConfigError, check_integer, check_range

#: Answers per prompt, all of which are kept in memory.
MAX_SAMPLES = 1_000_000
#: In place of a token where the logits are no numbers.
NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text is continued.

    Args:
        max_new_tokens: tokens after which an answer is cut.
        temperature: divides the logits; 0 takes the most likely token (greedy), and then the next three do nothing.
        top_k: draw among the k most likely tokens only; None draws among all.
        top_p: draw among the fewest most likely tokens whose probabilities reach p (Holtzman et al. 2020,
            arXiv 1904.09751); None draws among all.
        min_p: draw among tokens of at least p times the probability of the most likely one (Nguyen et al. 2024,
            arXiv 2407.01082); None draws among all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred (Keskar et al.
            2019, arXiv 1909.05858, section 4.1); 1 leaves them.
        stop: texts that end an answer; the answer does not include them.
        samples: answers per prompt.
        seed: decides all draws, with the numbers of the prompt and of the sample; the batch has no influence.

    Raises:
        ConfigError: a value of another kind or out of its range.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.9, samples=3).samples
        3
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, low=1)
        check_range("temperature", self.temperature, low=0)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, low=1)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, low=0, high=1)
        check_range("repetition_penalty", self.repetition_penalty, low=0.01, high=100)
        check_integer("samples", self.samples, low=1, high=MAX_SAMPLES)
        check_integer("seed", self.seed, low=0)
        stop: object = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={list(self.stop)} must be a list of texts that are not empty.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def choose(self, logits_BW: Tensor, seen_BP: Tensor, uniform_B: Tensor) -> Tensor:
        """Returns the next token of each sequence, (B,) int64; `NO_TOKEN` where the largest logit is not finite.

        Args:
            logits_BW: of the last position.
            seen_BP: ids of prompt and answer so far; -1 is padding. Only read if there is a repetition penalty.
            uniform_B: one random number in [0, 1) per sequence, float64. Not read by greedy choice.
        """
        logits_BW = logits_BW.float()
        if self.repetition_penalty != 1:
            logits_BW = _penalised(logits_BW, seen_BP, self.repetition_penalty)
        largest_B1 = logits_BW.amax(-1, keepdim=True)
        next_B = logits_BW.argmax(-1) if self.greedy else self._draw(logits_BW - largest_B1, uniform_B)
        return torch.where(largest_B1.squeeze(1).isfinite(), next_B, NO_TOKEN)

    def _draw(self, logits_BW: Tensor, uniform_B: Tensor) -> Tensor:
        """Returns a token of each sequence, whose largest logit is 0, so that no temperature makes it infinite."""
        # Below the least normal number of float32 a kernel may divide by 0.
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        kept_BW = _cut(logits_BW / temperature, self.top_k, self.top_p, self.min_p)
        # The inverse of the cumulative distribution, in float64: in float32 the sum over 10^5 tokens would be rough.
        cumulative_BW = kept_BW.double().softmax(-1).cumsum(-1)
        drawn_B1 = uniform_B.to(cumulative_BW).unsqueeze(1) * cumulative_BW[:, -1:]
        # NaN, which no sum reaches, must be no token beyond the vocabulary either.
        return torch.searchsorted(cumulative_BW, drawn_B1, right=True).squeeze(1).clamp_max(logits_BW.shape[1] - 1)


def _penalised(logits_BW: Tensor, seen_BP: Tensor, penalty: float) -> Tensor:
    occurred_BW = torch.zeros(logits_BW.shape[0], logits_BW.shape[1] + 1, dtype=torch.bool, device=logits_BW.device)
    # Padding marks an extra column, which is dropped.
    occurred_BW.scatter_(1, torch.where(seen_BP < 0, logits_BW.shape[1], seen_BP), True)
    lowered_BW = torch.where(logits_BW > 0, logits_BW / penalty, logits_BW * penalty)
    return torch.where(occurred_BW[:, :-1], lowered_BW, logits_BW)


def _cut(logits_BW: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Returns the logits with -inf at the tokens that may not be drawn; the most likely one always may."""
    if top_k is not None and top_k < logits_BW.shape[1]:
        least_B1 = logits_BW.topk(top_k).values[:, -1:]
        logits_BW = logits_BW.masked_fill(logits_BW < least_B1, -math.inf)
    if top_p is not None and top_p < 1:
        sorted_BW, order_BW = logits_BW.sort(descending=True, stable=True)
        shares_BW = sorted_BW.softmax(-1)
        # A token stays if those that are more likely do not reach p yet.
        drop_BW = shares_BW.cumsum(-1) - shares_BW >= top_p
        drop_BW[:, 0] = False
        logits_BW = logits_BW.masked_fill(torch.zeros_like(drop_BW).scatter(1, order_BW, drop_BW), -math.inf)
    if min_p is not None:
        shares_BW = logits_BW.softmax(-1)
        logits_BW = logits_BW.masked_fill(shares_BW < min_p * shares_BW.amax(-1, keepdim=True), -math.inf)
    return logits_BW
