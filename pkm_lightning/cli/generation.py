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
from pkm_lightning.errors import ConfigError, DataError, check_flag, check_integer, counted
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
    return texts_by(job, read_prompts)


def conversations_of(job: Job) -> list[Prompt] | None:
    """Returns the texts and conversations that `prompt` or `prompts_file` give; None if neither is set.

    Raises:
        ConfigError: both are set, or a prompt is no text.
        DataError: the file is missing, empty or not readable.
    """
    return texts_by(job, read_conversations)


def texts_by(job: Job, read: Callable[[Path, str], Any], *, key: str = "prompt", file_key: str = "prompts_file") -> Any:
    """Returns the texts that one of two keys gives; None if neither is set. Errors as `conversations_of`.

    Args:
        job: the command.
        read: the reader of files; its second argument is the key's name, for errors.
        key: of a text or a list of texts.
        file_key: of a file; `-` stands for the standard input.
    """
    text, file = _plain(job.config[key]), job.config[file_key]
    if text is not None and file is not None:
        raise ConfigError(f"{key}={text} and {file_key}={file} both give {key}s; leave one of them out.")
    if text is not None:
        texts = [text] if isinstance(text, str) else text
        check_prompts(texts, key)
        if not texts:
            raise ConfigError(f"{key}=[] holds no text; give {key}=TEXT or {key}=[TEXT,...].")
        return list(texts)
    if file is None:
        return None
    if not isinstance(file, str):
        raise ConfigError(f"{file_key}={file} is not text; quote it: \"{file_key}='{file}'\".")
    if file == STANDARD_INPUT:
        return _lines_of_standard_input(file_key)
    return read(Path(expanded(file_key, file)), file_key)


def _lines_of_standard_input(key: str) -> list[str]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{key}=-: byte {error.start} of the standard input is not UTF-8; convert it.") from None
    prompts = [line for line in split_lines(text) if line.strip()]
    if not prompts:
        raise DataError(f"{key}=-: the standard input is empty; write one {key.removesuffix('s_file')} per line.")
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
        f"prompts: {counted(speed.prompt_tokens, 'token')}{_rate(speed.prompt_tokens, speed.prompt_seconds)}; "
        # The first token of an answer comes with the prompt, and is not timed.
        f"answers: {counted(written, 'token')}{_rate(speed.new_tokens, speed.new_seconds)}; ended: {ended or 'none'}"
    )


def _rate(tokens: int, seconds: float) -> str:
    return f" at {tokens / seconds:,.0f}/s" if tokens and seconds else ""
