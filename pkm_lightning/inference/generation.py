"""Continuation of prompts with a cache of keys and values, in batches of prompts of similar lengths.

Letters: B sequences, T positions, P tokens so far (padding, prompt and answer), W vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.data.base import prompt_ids, vocab_size_of
from pkm_lightning.errors import ConfigError
from pkm_lightning.inference.sampling import NO_TOKEN, Sampling

if TYPE_CHECKING:
    from pkm_lightning.data.base import TextCodec
    from pkm_lightning.inference.read_tokens import ReadTokens
    from pkm_lightning.model import Transformer
    from pkm_lightning.model.cache import DecodingCache

#: The id that fills the left of shorter prompts. The model sees it as token 0, which nothing attends to.
_PADDING = -1
#: Random numbers that are drawn at once per answer: answers may be of any length.
_DRAWS = 256

_log = logging.getLogger(__name__)


@dataclass
class Answer:
    """One continuation of a prompt.

    Attributes:
        prompt: number of its prompt.
        sample: number of the answer among those of its prompt.
        ids: tokens written so far, without the token that ended it.
        text: their text, up to the stop text that ended it.
        ended: why it ended: `eos`, `stop`, `length` (`max_new_tokens`), `context` (the model reads no more tokens) or
            `interrupted`, `hopeless` (its caller had seen enough), or `nan` (the logits are no numbers); empty while it
            is written.
    """

    prompt: int
    sample: int
    ids: list[int]
    text: str = ""
    ended: str = ""

    def settled(self, stop: Sequence[str]) -> str:
        """Returns the part of the text that further tokens cannot change: no half character, no half stop text."""
        if self.ended:
            return self.text
        text = self.text.rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (n for end in stop for n in range(1, len(end)) if text.endswith(end[:n]))
        return text[: len(text) - max(begun, default=0)]


@dataclass
class Speed:
    """Tokens and seconds of reading prompts, and of writing what follows the first token of each answer."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(
            self.prompt_tokens + other.prompt_tokens,
            self.prompt_seconds + other.prompt_seconds,
            self.new_tokens + other.new_tokens,
            self.new_seconds + other.new_seconds,
        )


def greedy(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    *,
    device: torch.device,
    max_new_tokens: int = 32,
    batch_size: int = 512,
    hopeless: Callable[[Answer], bool] | None = None,
    prompts_read: Callable[[list[Answer], Tensor, DecodingCache | None], None] | None = None,
) -> list[str]:
    """Returns the most likely continuation of each prompt up to the end-of-text token, as stripped text.

    Args:
        model: in evaluation mode.
        tokenizer: encodes the prompts and decodes the answers.
        prompts: texts without a trailing space: the model writes the space before its answer.
        device: the device that the model is on.
        max_new_tokens: tokens after which an answer is cut.
        batch_size: largest number of prompts per forward.
        hopeless, prompts_read: see `Generation`.
    """
    made = Generation(
        model, tokenizer, prompts, Sampling(max_new_tokens=max_new_tokens),
        device=device, batch_size=batch_size, hopeless=hopeless, prompts_read=prompts_read,
    )  # fmt: skip
    made.run()
    return [answer.text.strip() for (answer,) in made.answers]


def generate(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: Sequence[str | list[int]],
    sampling: Sampling,
    *,
    device: torch.device,
    batch_size: int = 64,
    context: int | None = None,
    end_ids: Collection[int] = (),
    watch: Callable[[Answer], None] | None = None,
) -> list[list[Answer]]:
    """Returns `sampling.samples` answers to each prompt, in the order of the prompts; see `Generation`.

    Example: `docs/trained-models.md`, "From a program": `loaded.generate` calls it.
    """
    made = Generation(
        model, tokenizer, prompts, sampling,
        device=device, batch_size=batch_size, context=context, end_ids=end_ids, watch=watch,
    )  # fmt: skip
    made.run()
    return made.answers


def encode_prompts(tokenizer: TextCodec, prompts: Sequence[str], context: int | None = None) -> list[list[int]]:
    """Returns the ids of each prompt, at least one.

    Raises:
        ConfigError: a prompt has more tokens than `context`.
    """
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    long = [number for number, ids in enumerate(encoded, 1) if context is not None and len(ids) > context]
    if long:
        others = f" ({len(long) - 1} more are too long)" if len(long) > 1 else ""
        raise ConfigError(
            f"prompt {long[0]} has {len(encoded[long[0] - 1])} tokens, and the model was trained on sequences of "
            f"{context}{others}; shorten it, or set extrapolate=true to read on at positions beyond those of training."
        )
    return encoded


class Generation:
    """Answers to prompts. After an exception, such as the user's interruption, it holds what was written until then.

    Args:
        model: in evaluation mode.
        tokenizer: encodes the prompts and decodes the answers.
        prompts: texts, or token ids. Most tokenizers put a space before a word, so a prompt should not end with one.
        sampling: how each token is chosen and where an answer ends.
        device: the device that the model is on.
        batch_size: largest number of answers written together.
        context: most tokens that the model reads per sequence, or None for any number.
        numbers: the prompts' numbers, which decide the draws; by default 0, 1, ...
        end_ids: tokens that end an answer, besides those that end a text.
        past: what was read before, where there is one prompt and one sample.
        watch: called with an answer whenever it has a new token or has ended.
        hopeless: called with an answer that has a new token and goes on; True ends it.
        prompts_read: called once per batch, with its answers, the logits of their first tokens, and the cache, which
            holds their prompts then; None for a model without one.

    Attributes:
        answers: `sampling.samples` answers to each prompt, in the order of the prompts.
        speed: tokens and seconds so far.

    Raises:
        ConfigError: a prompt has more tokens than `context`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: TextCodec,
        prompts: Sequence[str | list[int]],
        sampling: Sampling,
        *,
        device: torch.device,
        batch_size: int = 64,
        context: int | None = None,
        numbers: Sequence[int] | None = None,
        end_ids: Collection[int] = (),
        past: ReadTokens | None = None,
        watch: Callable[[Answer], None] | None = None,
        hopeless: Callable[[Answer], bool] | None = None,
        prompts_read: Callable[[list[Answer], Tensor, DecodingCache | None], None] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._device = model, tokenizer, sampling, device
        self._batch_size, self._context, self._past, self._watch = batch_size, context, past, watch
        self._hopeless, self._prompts_read = hopeless, prompts_read
        self._end_ids = {tokenizer.eos_id, *model.end_ids, *end_ids}
        n_ids = vocab_size_of(tokenizer)
        self._n_ids = None if n_ids is None else max(n_ids, *(end + 1 for end in self._end_ids))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(encode_prompts(tokenizer, texts, context))
        self._prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
        self._numbers = range(len(prompts)) if numbers is None else numbers
        self.answers = [[Answer(i, sample, []) for sample in range(sampling.samples)] for i in range(len(prompts))]
        self.speed = Speed()

    # Compiled blocks run uncompiled here: every token has another length, and compiling takes longer than the answers.
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def run(self) -> None:
        """Writes all answers."""
        # Sorted by length, so that a batch has little padding.
        ordered = sorted(itertools.chain.from_iterable(self.answers), key=self._prompt_length)
        groups = [ordered]
        if not self._model.is_cacheable:  # nothing is padded on the left without a cache: a batch has one length
            groups = [list(same) for _, same in itertools.groupby(ordered, self._prompt_length)]
        for group in groups:
            for start in range(0, len(group), self._batch_size):
                self._write(group[start : start + self._batch_size])
        if lost := sum(answer.ended == "nan" for answer in ordered):
            _log.warning(
                "%d of %d answers end where the logits are no numbers (NaN): the weights have diverged; use an earlier "
                "checkpoint",
                lost,
                len(ordered),
            )

    def interrupt(self) -> None:
        """Ends all answers where they are."""
        for answer in itertools.chain.from_iterable(self.answers):
            if not answer.ended:
                answer.text, answer.ended = self._tokenizer.decode(answer.ids), "interrupted"

    def _prompt_length(self, answer: Answer) -> int:
        return len(self._prompts[answer.prompt])

    def _limit(self, answer: Answer) -> int:
        """Returns the most tokens that an answer may have; the last one is never read."""
        longest = self._sampling.max_new_tokens
        return longest if self._context is None else min(longest, self._context - self._prompt_length(answer) + 1)

    def _write(self, answers: list[Answer]) -> None:
        """Writes one batch of `answers` in place."""
        prompts = [self._prompts[answer.prompt] for answer in answers]
        seen_BP = _left_padded(prompts, self._device)
        inputs_BT, valid_BT = seen_BP.clamp_min(0), None
        if len(set(map(len, prompts))) > 1:
            valid_BT = seen_BP != _PADDING
        cache: DecodingCache | None = None
        if self._past is not None:
            cache, inputs_BT = self._past.resume(prompts[0], self._device)
        elif self._model.is_cacheable:
            cache = self._model.new_cache(len(answers), seen_BP.shape[1] + max(map(self._limit, answers)) - 1)
        draws = _Draws([(self._numbers[answer.prompt], answer.sample) for answer in answers], self._sampling)
        for step in itertools.count():
            started = time.perf_counter()
            hidden_BTD = self._model(inputs_BT, valid_BT=valid_BT, cache=cache).hidden_BTD
            uniform_B = draws.at(step).to(self._device)
            logits_BW = self._model.unembed(hidden_BTD[:, -1])
            if step == 0 and self._prompts_read is not None:
                self._prompts_read(answers, logits_BW, cache)
            logits_BW = self._known(logits_BW)
            next_B = self._sampling.choose(logits_BW, seen_BP, uniform_B)
            tokens = next_B.tolist()  # waits for an accelerator, so that the clock is right
            self._count(step, inputs_BT.numel() if valid_BT is None else int(valid_BT.sum()), answers, started)
            if self._past is not None and cache is not None:
                self._past.ids += inputs_BT[0].tolist()
            for answer, token in zip(answers, tokens, strict=True):
                if not answer.ended:
                    self._enter(answer, token)
            rows = [row for row, answer in enumerate(answers) if not answer.ended]
            if not rows:
                return
            seen_BP = torch.cat([seen_BP, next_B.unsqueeze(1)], dim=1)
            inputs_BT, valid_BT = (seen_BP if cache is None else next_B.unsqueeze(1)).clamp_min(0), None
            # Answers that have ended are computed with the others until they are half of the batch.
            if len(rows) <= len(answers) // 2:
                rows_B = torch.tensor(rows, device=self._device)
                if cache is not None:
                    cache.select(rows_B)
                answers = [answers[row] for row in rows]
                inputs_BT, seen_BP = inputs_BT[rows_B], seen_BP[rows_B]
                draws.select(rows)

    def _known(self, logits_BW: Tensor) -> Tensor:
        """Returns the logits with -inf at ids that the tokenizer does not have: no text has trained them."""
        if self._n_ids is None or self._n_ids >= logits_BW.shape[1]:
            return logits_BW
        is_known_W = torch.arange(logits_BW.shape[1], device=logits_BW.device) < self._n_ids
        return logits_BW.masked_fill(~is_known_W, -torch.inf)

    def _count(self, step: int, read: int, answers: list[Answer], started: float) -> None:
        seconds = time.perf_counter() - started
        if step == 0:
            self.speed.prompt_tokens += read
            self.speed.prompt_seconds += seconds
        else:
            self.speed.new_tokens += sum(not answer.ended for answer in answers)
            self.speed.new_seconds += seconds

    def _enter(self, answer: Answer, token: int) -> None:
        """Adds a token to an answer, or ends it."""
        if token == NO_TOKEN:
            answer.ended = "nan"
        elif token in self._end_ids:
            answer.ended = "eos"
        else:
            answer.ids.append(token)
            if len(answer.ids) == self._sampling.max_new_tokens:
                answer.ended = "length"
            elif len(answer.ids) == self._limit(answer):
                answer.ended = "context"
            elif self._hopeless is not None and self._hopeless(answer):
                answer.ended = "hopeless"
        # Decoding is slow beside a step of a small model, and needed at the end only unless somebody reads along.
        if self._watch is not None or self._sampling.stop or answer.ended:
            answer.text = self._tokenizer.decode(answer.ids)
        ends = [answer.text.index(stop) for stop in self._sampling.stop if stop in answer.text]
        if ends:
            answer.text, answer.ended = answer.text[: min(ends)], "stop"
        if self._watch is not None:
            self._watch(answer)


def _left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns the ids of all sequences, (B, T), filled on the left."""
    width = max(map(len, sequences))
    return torch.tensor([[_PADDING] * (width - len(ids)) + list(ids) for ids in sequences], device=device)


class _Draws:
    """Random numbers of a batch: float64, one per answer and step, by seed, prompt and sample alone."""

    def __init__(self, keys: Sequence[tuple[int, int]], sampling: Sampling) -> None:
        self._block_BT = torch.zeros(len(keys), _DRAWS, dtype=torch.float64)
        self._generators: list[torch.Generator] = []
        if not sampling.greedy:
            seeds = [zlib.crc32(f"{sampling.seed}/{prompt}/{sample}".encode()) for prompt, sample in keys]
            self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def at(self, step: int) -> Tensor:
        """Returns the numbers of a step, (B,); steps are asked for in their order."""
        if step % _DRAWS == 0 and self._generators:
            rows = [torch.rand(_DRAWS, dtype=torch.float64, generator=generator) for generator in self._generators]
            self._block_BT = torch.stack(rows)
        return self._block_BT[:, step % _DRAWS]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the answers `rows`."""
        self._block_BT = self._block_BT[list(rows)]
        self._generators = [self._generators[row] for row in rows] if self._generators else []
