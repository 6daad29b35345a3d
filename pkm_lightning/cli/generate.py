"""`generate`: continues prompts, streamed to a terminal, printed or written as JSON lines.

A line of `out` is `{"index", "prompt", "sample", "answer", "ended", "tokens"}`, in the order of prompts and samples.
Of a conversation it has `messages` in the place of `prompt`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pkm_lightning.cli.command_keys import GENERATION_KEYS, PROMPT_KEYS
from pkm_lightning.cli.generation import conversations_of, generation_settings, speed_line
from pkm_lightning.cli.job import Job, log_to_stderr
from pkm_lightning.cli.loading import load_of_job
from pkm_lightning.cli.streaming import Streamer
from pkm_lightning.data.prompts import Prompt
from pkm_lightning.errors import ConfigError, Interrupted
from pkm_lightning.inference.generation import Answer, Generation
from pkm_lightning.storage import check_target, is_stream, write_beside

_log = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Writes the answers to all prompts; an interruption keeps those begun."""
    log_to_stderr()  # the standard output has the answers and nothing else
    settings = generation_settings(job)
    out = None if job.config.out is None else Path(job.config.out)
    if out is not None:
        check_target("out", out)
    asked = conversations_of(job)
    if asked is None:
        raise ConfigError("nothing to continue; give prompt=TEXT, or prompts_file=FILE (- for the standard input).")
    loaded = load_of_job(job, (*PROMPT_KEYS, *GENERATION_KEYS))
    context = settings.context(loaded.context)
    prompts, end_ids = loaded.rendered(asked, context)
    if loaded.chat_template is not None and all(isinstance(prompt, str) for prompt in asked):
        _log.info("the model has a chat template: chat, or a prompts_file with messages, puts prompts into it")
    streamed = sys.stdout.isatty() and len(prompts) == settings.sampling.samples == 1
    generation = Generation(
        loaded.model,
        loaded.codec(),
        prompts,
        settings.sampling,
        device=loaded.device,
        batch_size=settings.batch_size,
        context=context,
        end_ids=end_ids,
        watch=Streamer(settings.sampling.stop) if streamed else None,
    )
    if streamed:
        print(_text(asked[0]), end="", flush=True)
    try:
        generation.run()
    except KeyboardInterrupt:
        generation.interrupt()
    answers = [answer for of_prompt in generation.answers for answer in of_prompt]
    if out is not None:
        write_beside(out, "".join(_line(asked[answer.prompt], answer) + "\n" for answer in answers))
    if streamed:
        print(flush=True)
    elif out is None or not is_stream(out):
        print(_shown([_text(prompt) for prompt in asked], answers), flush=True)
    print(speed_line(generation.speed, answers), file=sys.stderr)
    if any(answer.ended == "interrupted" for answer in answers):
        raise Interrupted("interrupted; the answers end where they were", 130)


def _text(prompt: Prompt) -> str:
    """Returns a prompt for the screen, of a conversation its last message."""
    return prompt if isinstance(prompt, str) else f"{prompt[-1]['content']}\n"


def _line(prompt: Prompt, answer: Answer) -> str:
    record = {
        "index": answer.prompt,
        "prompt" if isinstance(prompt, str) else "messages": prompt,
        "sample": answer.sample,
        "answer": answer.text,
        "ended": answer.ended,
        "tokens": len(answer.ids),
    }
    return json.dumps(record, ensure_ascii=False)


def _shown(prompts: Sequence[str], answers: Sequence[Answer]) -> str:
    """Returns the only answer, or all of them under headings."""
    if len(answers) == 1:
        return answers[0].text
    several = len(answers) > len(prompts)
    blocks = []
    for answer in answers:
        sample = f", sample {answer.sample + 1}" if several else ""
        blocks.append(f"--- prompt {answer.prompt + 1}{sample}: {_cut(prompts[answer.prompt])}\n{answer.text}")
    return "\n\n".join(blocks)


def _cut(prompt: str, width: int = 80) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= width else f"... {line[4 - width :]}"
