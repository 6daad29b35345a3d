"""Keys of configs/generate.yaml, which `generate`, `chat` and `predict` share, checked before a model is read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pkm_lightning.cli.job import Job
from pkm_lightning.cli.paths import expanded
from pkm_lightning.data.files import check_characters, split_lines
from pkm_lightning.data.prompts import Prompt, check_prompts, read_conversations, read_prompts
from pkm_lightning.errors import ConfigError, DataError, check_flag, check_integer
from pkm_lightning.inference.generation import Answer, Speed
from pkm_lightning.inference.sampling import Sampling

#: The standard input in place of a file.
STANDARD_INPUT = "-"
#: Keys that choose among likely tokens, of which greedy choice takes the first.
_KEYS_OF_DRAWS = ("top_k", "top_p", "min_p", "sample_seed")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How the answers of one command are written.

    Attributes:
        sampling: how each token is chosen and where an answer ends.
        batch_size: largest number of answers written together.
        extrapolate: whether the model reads more tokens per sequence than in training.
    """

    sampling: Sampling
    batch_size: int
    extrapolate: bool

    def context(self, trained: int | None) -> int | None:
        """Returns the most tokens that the model reads per sequence, given those of its training; None for any."""
        return None if self.extrapolate else trained


def generation_settings(job: Job) -> GenerationSettings:
    """Returns the settings of a command.

    Raises:
        ConfigError: a value of another kind or out of its range, or one that would do nothing beside another.
    """
    given = {key: _plain(job.config[key]) for key in (*_KEYS_OF_DRAWS, "temperature", "repetition_penalty", "samples")}
    longest = job.config.max_new_tokens
    if longest is None:
        longest = 32 if job.verb == "predict" else 256
    check_integer("sample_seed", given["sample_seed"], low=0)
    stop = _plain(job.config.stop)
    sampling = Sampling(
        max_new_tokens=longest,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        seed=given.pop("sample_seed"),
        **given,
    )
    if sampling.greedy:
        idle = [key for key in _KEYS_OF_DRAWS if job.sets(key) and job.config[key] is not None]
        if idle:
            raise ConfigError(
                f"{idle[0]}={job.config[idle[0]]} does nothing with temperature=0, which takes the most likely token; "
                f"set temperature=1, or leave {idle[0]} out."
            )
        if sampling.samples > 1:
            raise ConfigError(
                f"samples={sampling.samples} would be equal with temperature=0, which takes the most likely token; set "
                "temperature=1, or leave samples out."
            )
    check_integer("batch_size", job.config.batch_size, low=1)
    check_flag("extrapolate", job.config.extrapolate)
    return GenerationSettings(sampling=sampling, batch_size=job.config.batch_size, extrapolate=job.config.extrapolate)


def prompts_of(job: Job) -> list[str] | None:
    """Returns the texts that `prompt` or `prompts_file` give; None if neither is set. Errors as `conversations_of`."""
    return _prompts_by(job, read_prompts)


def conversations_of(job: Job) -> list[Prompt] | None:
    """Returns the texts and conversations that `prompt` or `prompts_file` give; None if neither is set.

    Raises:
        ConfigError: both are set, or a prompt is no text.
        DataError: the file is missing, empty or not readable.
    """
    return _prompts_by(job, read_conversations)


def _prompts_by(job: Job, read: Callable[[Path, str], Any]) -> Any:
    prompt, file = _plain(job.config.prompt), job.config.prompts_file
    if prompt is not None and file is not None:
        raise ConfigError(f"prompt={prompt} and prompts_file={file} both give prompts; leave one of them out.")
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        check_prompts(prompts, "prompt")
        if not prompts:
            raise ConfigError("prompt=[] holds no text; give prompt=TEXT or prompt=[TEXT,...].")
        return list(prompts)
    if file is None:
        return None
    if not isinstance(file, str):
        raise ConfigError(f"prompts_file={file} is not text; quote it: \"prompts_file='{file}'\".")
    if file == STANDARD_INPUT:
        return _lines_of_standard_input()
    return read(Path(expanded("prompts_file", file)), "prompts_file")


def _lines_of_standard_input() -> list[str]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise DataError(f"prompts_file=-: byte {error.start} of the standard input is not UTF-8; convert it.") from None
    prompts = [line for line in split_lines(text) if line.strip()]
    if not prompts:
        raise DataError("prompts_file=-: the standard input is empty; write one prompt per line.")
    for number, prompt in enumerate(prompts, 1):
        check_characters(f"line {number} of the standard input", prompt)
    return prompts


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def speed_line(speed: Speed, answers: Sequence[Answer]) -> str:
    """Returns tokens per second, and how many answers ended why, as one line."""
    reasons = [answer.ended for answer in answers]
    counts = {reason: reasons.count(reason) for reason in ("eos", "stop", "length", "context", "interrupted", "nan")}
    ended = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    written = sum(len(answer.ids) for answer in answers)
    return (
        f"prompts: {speed.prompt_tokens:,} tokens{_rate(speed.prompt_tokens, speed.prompt_seconds)}; "
        # The first token of an answer comes with the prompt, and is not timed.
        f"answers: {written:,} tokens{_rate(speed.new_tokens, speed.new_seconds)}; ended: {ended or 'none'}"
    )


def _rate(tokens: int, seconds: float) -> str:
    return f" at {tokens / seconds:,.0f}/s" if tokens and seconds else ""
