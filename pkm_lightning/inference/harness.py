"""A model of this package as lm-evaluation-harness sees it: likelihoods of texts, and answers to prompts.

The conventions are those of the harness's own `hf` model (lm_eval 0.4.13), so that scores compare: an empty context is
the token that begins a text, what exceeds the context is cut off on the left, and a longer text is read in windows
that predict each of its tokens once. This module imports lm_eval, which is an extra; nothing imports it at the top.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_MAX_LENGTH
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pkm_lightning.errors import ConfigError
from pkm_lightning.inference.generation import Answer, generate
from pkm_lightning.inference.harness_sampling import sampling_of
from pkm_lightning.inference.likelihood import Continuation, Likelihood, score
from pkm_lightning.inference.sampling import Sampling
from pkm_lightning.inference.synchronized_forwards import synchronized_forwards
from pkm_lightning.ops.ranks import is_distributed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.model import Transformer

R = TypeVar("R")
V = TypeVar("V")
#: Encodings that are kept: the requests of a question follow each other and have one context.
_KEPT_ENCODINGS = 4

_log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """Adapter of a model and its tokenizer. Under several ranks they share the requests, and all get all results.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        context: tokens that the model may read at once; None for 2,048, the harness's own default.
        device: the device that the model is on.
        batch_size: largest number of sequences per forward.
        begin_id: token before every text, where the model was trained with one; None for models of this package.
        prefix_id: token that an empty context consists of; None for `begin_id`, or else the end token.
        progress: whether progress bars are shown.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextCodec,
        *,
        context: int | None,
        device: torch.device,
        batch_size: int,
        begin_id: int | None = None,
        prefix_id: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self._model, self._codec, self._device = model, tokenizer, device
        self._context, self._batch_size, self._progress = context or DEFAULT_MAX_LENGTH, batch_size, progress
        self._begin = [] if begin_id is None else [begin_id]
        self._prefix_id = (self._begin or [tokenizer.eos_id])[0] if prefix_id is None else prefix_id
        self._encode = functools.lru_cache(maxsize=_KEPT_ENCODINGS)(tokenizer.encode)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context consists of."""
        return self._prefix_id

    @property
    def max_length(self) -> int:
        """Tokens that the model may read at once."""
        return self._context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text, behind the token that begins it unless `add_special_tokens` is False."""
        return self._encode(string) if add_special_tokens is False else self._begin + self._encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns ln p(continuation | context) of each request, and whether it is the greedy continuation."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns ln p of each request's whole text."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, predicted in map(make_disjoint_window, rolling):
                windows.append((context, predicted))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, likelihood in zip(owners, self._score(windows), strict=True):
            totals[number] += likelihood.nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that follows each prompt, up to the first stop text of its task."""
        groups: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            sampling = sampling_of(request.args[1], context=self.max_length, task=str(request.task_name))
            groups.setdefault(sampling, []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=not self._progress) as bar:
            for sampling, numbers in groups.items():
                prompts = [str(requests[number].args[0]) for number in numbers]
                write = functools.partial(self._write, sampling=sampling, bar=bar)
                for number, text in zip(numbers, self._shared(prompts, write), strict=True):
                    texts[number] = text
        return texts

    def _write(self, prompts: Sequence[str], *, sampling: Sampling, bar: Any) -> list[str]:
        """Returns the answer to each prompt, of which as much as fits is read."""
        codec = _LastTokens(self._codec, self.max_length - sampling.max_new_tokens, self._begin)
        answers = generate(
            self._model,
            codec,
            prompts,
            sampling,
            device=self._device,
            batch_size=self._batch_size,
            watch=lambda answer: _advance(bar, answer),
        )
        _warn_of_cuts(codec.n_cut, len(prompts), self.max_length)
        return [answer.text for (answer,) in answers]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = self._score([(context, continuation) for _, context, continuation in requests])
        return [(likelihood.nats, likelihood.is_greedy) for likelihood in scored]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Returns the likelihood of each (context, continuation)."""
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.max_length:
            raise ConfigError(
                f"tasks: a continuation has {longest} tokens, more than the context of {self.max_length} that the "
                "model was trained for; leave that task out, or use a model with a longer context."
            )
        cut = [
            # A context of spaces alone is moved to the continuation and leaves nothing.
            Continuation(tuple((context or [self.prefix_token_id]) + continuation)[-self.max_length - 1 :], n)
            for context, continuation in pairs
            if (n := len(continuation))
        ]
        n_cut = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        _warn_of_cuts(n_cut, len(pairs), self.max_length)
        with tqdm(total=len(cut), desc="likelihoods", disable=not self._progress) as bar:
            score_share = functools.partial(
                score, self._model, device=self._device, batch_size=self._batch_size, done=bar.update
            )
            scored = self._shared(cut, score_share)
        if lost := sum(math.isnan(likelihood.nats) for likelihood in scored):
            _log.warning(
                "%d of %d likelihoods are no numbers (NaN): the weights have diverged; use an earlier checkpoint",
                lost,
                len(scored),
            )
        likelihoods = iter(scored)
        # Nothing follows with certainty.
        return [next(likelihoods) if continuation else Likelihood(0.0, True) for _, continuation in pairs]

    def _shared(self, values: Sequence[V], compute: Callable[[Sequence[V]], list[R]]) -> list[R]:
        """Returns what `compute` returns for `values`, of which each rank takes every n-th. Collective."""
        if not is_distributed():
            return compute(values)
        rank, n_ranks = dist.get_rank(), dist.get_world_size()
        with synchronized_forwards(self._model, self._device):
            of_rank = compute(values[rank::n_ranks])
        gathered: list[list[R]] = [[] for _ in range(n_ranks)]
        dist.all_gather_object(gathered, of_rank)
        return [gathered[number % n_ranks][number // n_ranks] for number in range(len(values))]


class _LastTokens:
    """A tokenizer that puts `begin` before a text and keeps the last `length` tokens."""

    def __init__(self, codec: TextCodec, length: int, begin: list[int]) -> None:
        self._codec, self._length, self._begin = codec, length, begin
        self.eos_id = codec.eos_id
        self.n_cut = 0

    def encode(self, text: str) -> list[int]:
        ids = self._begin + self._codec.encode(text)
        self.n_cut += len(ids) > self._length
        return ids[-self._length :]

    def decode(self, ids: Sequence[int]) -> str:
        return self._codec.decode(ids)


def _advance(bar: Any, answer: Answer) -> None:
    if answer.ended:
        bar.update()


def _warn_of_cuts(n_cut: int, n: int, context: int) -> None:
    if n_cut:
        _log.warning(
            "%d of %d prompts do not fit in the context of %d tokens and lose their beginning", n_cut, n, context
        )
